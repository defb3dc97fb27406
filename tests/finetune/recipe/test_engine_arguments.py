"""The table of the engines' arguments: complete, true to the recipe's keys, and what a recipe is told."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import TrainingArguments

from align.engines.trl.configs import DPO_CONFIG, KTO_CONFIG, ONLINE_CONFIGS, REWARD_CONFIG
from finetune.recipe.discovery import adapter_settings, stage_names
from finetune.recipe.engine_arguments import (
    TRAINING_ARGUMENTS,
    TRL_ARGUMENTS,
    ByRecipe,
    Passed,
    engine_arguments,
)
from finetune.recipe.engine_rules import engine_args_problems
from finetune.recipe.recipe import stage_settings
from finetune.recipe.settings import TrainSettings
from finetune.training.arguments import SFT_CONFIG, ExecutionConfig, TrlConfigSpec, training_arguments

CONFIGS: dict[str, TrlConfigSpec] = {
    "SFTConfig": SFT_CONFIG,
    "RewardConfig": REWARD_CONFIG,
    "DPOConfig": DPO_CONFIG,
    "KTOConfig": KTO_CONFIG,
    **ONLINE_CONFIGS,
}
ENGINES = [("native", "SFTConfig"), *(("trl", name) for name in CONFIGS)]
SHARED = {field.name for field in fields(TrainingArguments)}


def problems(arguments: dict[str, Any], trl_config: str = "SFTConfig", **train: Any) -> list[Any]:
    return engine_args_problems(TrainSettings(engine_args=arguments, **train), trl_config)


def test_every_field_of_training_arguments_is_in_the_table() -> None:
    assert {"new": SHARED - TRAINING_ARGUMENTS.keys(), "gone": TRAINING_ARGUMENTS.keys() - SHARED} == {
        "new": set(),
        "gone": set(),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_trl_s_configs_is_in_the_table(name: str) -> None:
    own = {field.name for field in fields(getattr(trl, name))} - SHARED
    table = TRL_ARGUMENTS[name].keys()
    assert {"new": own - table, "gone": table - own} == {"new": set(), "gone": set()}


def test_every_stage_s_config_has_a_table() -> None:
    assert {stage_settings(stage).TRL_CONFIG for stage in stage_names()} == TRL_ARGUMENTS.keys()


@pytest.mark.parametrize("stage", stage_names())
def test_the_recipe_keys_exist(stage: str) -> None:
    settings = stage_settings(stage)
    keys = {
        f"{section}.{key}"
        for section, field in settings.model_fields.items()
        for key in field.annotation.model_fields
    }
    keys |= {f"adapter.{key}" for key in adapter_settings("lora").model_fields} | {"--out"}
    own = {entry.key for entry in TRL_ARGUMENTS[settings.TRL_CONFIG].values() if isinstance(entry, ByRecipe)}
    shared = {entry.key for entry in TRAINING_ARGUMENTS.values() if isinstance(entry, ByRecipe)}
    assert shared - keys == set()
    if settings.model_fields["train"].annotation(engine="trl").engine == "trl" and stage != "ppo":
        assert own - keys == set()


@pytest.mark.parametrize("strategy", ["single", "zero3", "fsdp2"])
@pytest.mark.parametrize(("engine", "name"), ENGINES)
def test_no_argument_that_llm_align_sets_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, name: str, strategy: str
) -> None:
    given: dict[str, Any] = {}

    class Config:
        def __init__(self, **arguments: Any) -> None:
            given.update(arguments)

    monkeypatch.setattr("finetune.training.arguments.replace_deepspeed_plugin", lambda arguments: None)
    monkeypatch.setattr("finetune.training.arguments.engine_class", lambda *config: Config)
    training_arguments(
        TrainSettings(engine=engine),
        folder=tmp_path,
        execution=ExecutionConfig("cpu", "float32", strategy=strategy),
        micro_batch_size=1,
        checkpoint_every=1,
        trl_config=CONFIGS[name],
    )
    table = engine_arguments(engine, name)
    assert len(given) > 30
    assert [argument for argument in given if isinstance(table[argument], Passed)] == []


GOOD_AND_BAD: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "adam_epsilon": ((1e-8, 1e-3), (0, -1e-8, 1, float("nan"), float("inf"), "1e-8", True, None, [])),
    "tf32": ((True, False), (1, "true", None)),
    "torch_empty_cache_steps": ((1, 50), (0, -1, 1.5, 2**40, True, "1")),
    "pad_to_multiple_of": ((1, 64), (0, -8, 2**40, 8.5, None)),
    "padding_free": ((True, False), (1, "yes")),
    "mask_truncated_completions": ((True, False), (0, "false")),
    "top_entropy_quantile": ((0.2, 1.0), (0, 1.1, float("nan"))),
    "entropy_coef": ((0, 0.01), (-0.1, 2, float("inf"))),
}
"""Values that are passed on, and values that are refused."""


@pytest.mark.parametrize(("engine", "name"), ENGINES)
def test_every_argument_is_passed_on_or_refused(engine: str, name: str) -> None:
    for argument, entry in engine_arguments(engine, name).items():
        where = f"train.engine_args.{argument}"
        if isinstance(entry, Passed):
            accepted, refused = GOOD_AND_BAD[argument]
            assert [problems({argument: value}, name, engine=engine) for value in accepted] == [[]] * len(
                accepted
            )
            for value in refused:
                [problem] = problems({argument: value}, name, engine=engine)
                assert problem.where == where and problem.actual.startswith("found "), value
        else:
            [problem] = problems({argument: 1}, name, engine=engine)
            assert problem.where == where and problem.repair
            known = "set by the recipe" if isinstance(entry, ByRecipe) else "refused: "
            assert problem.actual.startswith(known)


def test_all_mistakes_are_reported_together() -> None:
    given = {
        "save_only_model": True,
        "learning_rate": 1,
        "adam_epsilonn": 1,
        "adam_epsilon": -1,
        "tf32": True,
    }
    refused, set_by_recipe, unknown, out_of_range = problems(given)
    assert "cannot be resumed" in refused.actual and refused.repair == "remove it"
    assert refused.expected == "one of adam_epsilon, tf32, torch_empty_cache_steps"
    assert set_by_recipe.repair == "use train.learning_rate"
    assert unknown.actual == "unknown to the engine" and unknown.repair == "did you mean 'adam_epsilon'?"
    assert out_of_range.actual == "found -1" and "above 0 and below 1" in out_of_range.expected


def test_an_argument_that_the_optimizer_ignores_is_refused() -> None:
    assert problems({"adam_epsilon": 1e-6}, optimizer="adamw_8bit") == []
    [problem] = problems({"adam_epsilon": 1e-6}, optimizer="adafactor")
    assert problem.actual == "without effect: train.optimizer is 'adafactor'"


def test_each_engine_has_its_own_arguments() -> None:
    assert problems({"padding_free": True}, engine="trl") == []
    [problem] = problems({"padding_free": True})
    assert (
        problem.actual == "unknown to the engine" and problem.expected == "an argument of TrainingArguments"
    )
    [problem] = problems({"padding_free": True}, "DPOConfig", engine="trl")
    assert problem.actual.startswith("refused: without effect")
