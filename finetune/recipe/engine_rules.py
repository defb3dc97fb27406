"""Rules of ``train.engine_args``: arguments that are unknown, refused, or have a wrong value."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import Field, ValidationError, create_model

from finetune.recipe.compatibility import Rule
from finetune.recipe.engine_arguments import (
    TRL_ARGUMENTS,
    Argument,
    ByRecipe,
    Passed,
    engine_arguments,
)
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem, did_you_mean, one_of
from finetune.recipe.foreign_names import foreign_problem
from finetune.recipe.settings import Section, StageSettings, TrainSettings

WHERE = "train.engine_args"


def engine_args_problems(train: TrainSettings, trl_config: str) -> list[Problem]:
    """Return the problems of ``train.engine_args``: unknown and refused arguments, and wrong values."""
    known = engine_arguments(train.engine, trl_config)
    class_name = trl_config if train.engine == "trl" else "TrainingArguments"
    problems: list[Problem] = []
    passed: dict[str, Any] = {}
    for name, value in train.engine_args.items():
        argument = known.get(name)
        if isinstance(argument, Passed) and train.optimizer not in argument.ignored_by:
            passed[name] = value
        else:
            problems.append(_refusal(name, argument, known, class_name=class_name, train=train))
    try:
        _passed_section(train.engine, trl_config).model_validate(passed)
    except ValidationError as error:
        problems += validation_problems(WHERE, error, model=_passed_section(train.engine, trl_config))
    return problems


def _refusal(
    name: str,
    argument: Argument | None,
    known: Mapping[str, Argument],
    *,
    class_name: str,
    train: TrainSettings,
) -> Problem:
    where = f"{WHERE}.{name}"
    passed_on = [other for other, entry in known.items() if isinstance(entry, Passed)]
    if argument is None:
        expected = f"an argument of {class_name}"
        # An argument of another engine is no key of ours.
        other = any(name in arguments for arguments in TRL_ARGUMENTS.values())
        foreign = foreign_problem(where, name, train.engine_args[name], expected=expected)
        if foreign is not None and not other:
            return foreign
        return Problem(where, "unknown to the engine", expected, did_you_mean(name, known))
    if isinstance(argument, ByRecipe):
        return Problem(where, "set by the recipe", one_of(passed_on), f"use {argument.key}")
    if isinstance(argument, Passed):
        actual = f"without effect: train.optimizer is '{train.optimizer}'"
        return Problem(where, actual, one_of(item for item in passed_on if item != name), "remove it")
    return Problem(where, f"refused: {argument.reason}", one_of(passed_on), argument.repair)


@cache
def _passed_section(engine: str, trl_config: str) -> type[Section]:
    """Return a section whose keys are the arguments that are passed on."""
    fields: dict[str, Any] = {
        name: (argument.values, Field(None, description=argument.effect))
        for name, argument in engine_arguments(engine, trl_config).items()
        if isinstance(argument, Passed)
    }
    return create_model("EngineArguments", __base__=Section, **fields)


def _check_engine_args(settings: StageSettings) -> list[Problem]:
    return engine_args_problems(settings.train, settings.TRL_CONFIG)


ENGINE_RULES: tuple[Rule, ...] = (
    Rule(
        "engine-args",
        message="train.engine_args has arguments that llm-align passes on to the engine",
        source="finetune/recipe/engine_arguments.py",
        find=_check_engine_args,
        reads=("train",),
    ),
    Rule(
        "tf32-cpu",
        {"train.engine_args.tf32": (True,), "device": ("cpu",)},
        "TF32 is a number format of NVIDIA GPUs",
        "remove tf32 from train.engine_args",
        source="transformers 5.23, training_args.py: --tf32 requires Ampere or a newer GPU",
        evidence="run",
    ),
)
"""The rules of ``train.engine_args``."""
