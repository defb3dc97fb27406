"""Recipe section of the rewards in RL stages: reward runs and functions, weights, combination."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Field

from align.rl.rewards.run_info import DEFAULT_REWARD_NAME, RewardRunInfo, reward_run_info, same_base
from finetune.distributed.strategies import SHARDED_WEIGHTS
from finetune.recipe.compatibility import Rule
from finetune.recipe.discovery import load_stage
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.graders import grader_names
from finetune.recipe.parent_run import is_recipe_name
from finetune.recipe.python_function import FunctionName, PythonFunction
from finetune.recipe.runs import find_run, read_finished_record
from finetune.recipe.settings import (
    DataSettings,
    FiniteFloat,
    ModelSettings,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    Section,
)
from finetune.recipe.terminal import command_line
from finetune.recipe.user_arguments import ROW_NAMES, signature_problems
from finetune.recipe.user_function import load_user_function

LENGTH_PENALTY, RESERVED_TOTAL = "length_penalty", "total"
HELPFULNESS, SAFETY = "helpfulness", "safety"
"""Names of the two sources that ``combine: llama2`` requires."""


class RewardSource(Section):
    """One reward: a finished reward run, or a Python function."""

    # The content of a run identifies it (`input_digests`), not its path.
    NOT_IN_DIGEST: ClassVar[tuple[str, ...]] = ("run",)

    run: NonEmptyStr | None = Field(
        None,
        description="finished run of stage reward: a run directory, its name in ./runs, or a prefix of the "
        "name; or reward/RECIPE, which runs first if needed",
    )
    score: NonEmptyStr | None = Field(None, description="head or rule of the run; null: the total reward")
    function: FunctionName | None = Field(
        None,
        description="path/to/file.py:function, or a grader's name; parameters are filled by name (prompt, "
        "completion, expected, columns of the row); returns a number or bool",
    )
    name: NonEmptyStr | None = Field(None, description="name in metrics; null: name of the score or function")
    weight: FiniteFloat = Field(1.0, description="weight in the sum; 0: logged only")

    @property
    def metric_name(self) -> str:
        """Return the name in metrics and messages."""
        if isinstance(self.function, PythonFunction):
            return self.name or self.function.name
        if self.function is not None:
            return self.name or self.function.rpartition(":")[2]
        # The total of one run is not the total of all rewards.
        score = None if self.score == RESERVED_TOTAL else self.score
        return self.name or score or DEFAULT_REWARD_NAME


def _parse_sources(value: Any) -> Any:
    """Return sources as a list of mappings; a string is a function, a grader's name, or a run."""
    entries = value if isinstance(value, list | tuple) else [value]
    return [_parse_source(entry) for entry in entries]


def _parse_source(entry: Any) -> Any:
    if callable(entry) or isinstance(entry, PythonFunction):
        return {"function": entry}
    if not isinstance(entry, str):
        return entry
    return {"function" if ".py:" in entry or entry in grader_names() else "run": entry}


RewardSources = Annotated[
    list[RewardSource],
    BeforeValidator(
        _parse_sources, json_schema_input_type=list[RewardSource | NonEmptyStr] | RewardSource | NonEmptyStr
    ),
]


class RewardsSettings(Section):
    """The rewards to maximize."""

    sources: RewardSources = Field(
        [],
        description="rewards: a reward run, file.py:function, a grader, or a list of these; each may be "
        "{run: R, score: S, name: N, weight: W} or {function: F, ...}",
    )
    # Llama 2 (arXiv 2307.09288), section 3.2.3; weighted sums as in Sparrow (arXiv 2209.14375), section 2.6.
    combine: Literal["sum", "llama2"] = Field(
        "sum",
        description="sum: weighted; llama2: safety if prompt or completion is unsafe, else helpfulness",
    )
    unsafe_prompt_fn: FunctionName | None = Field(
        None, description="for llama2: file.py:function; (prompt) -> bool, whether the prompt is unsafe"
    )
    # Llama 2 (arXiv 2307.09288), section 3.2.3: 0.15, on the sigmoid of the safety model's score.
    safety_threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="for llama2: a completion is unsafe if sigmoid(safety score) is below this"
    )
    length_penalty: NonNegativeFloat = Field(
        0.0, description="penalty per completion token beyond length_free"
    )
    length_free: NonNegativeInt = Field(0, description="completion tokens without length penalty")

    def input_digests(self, function_digest: Callable[..., str]) -> list[str]:
        """Return digests of the reward runs and of the functions' files.

        Args:
            function_digest: (``file.py:function``, ``where=`` its key) -> digest of the file.

        Raises:
            UserError: a run is missing or not finished, or a file is missing.
        """
        digests = []
        for index, source in enumerate(self.sources):
            where = f"rewards.sources[{index}]"
            if source.function is not None:
                digests.append(function_digest(source.function, where=f"{where}.function"))
            else:
                record = read_finished_record(reward_run_folder(source, where=f"{where}.run"))
                # Normalization is part of it: it changes the scores.
                contents = [record["digest"], record["files"], record["reward_normalization"]]
                digests.append(hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest())
        return digests + (
            [function_digest(self.unsafe_prompt_fn, where="rewards.unsafe_prompt_fn")]
            if self.unsafe_prompt_fn is not None
            else []
        )


def has_rewards_section(stage: str) -> bool:
    """Return whether a stage has a rewards section."""
    field = load_stage(stage).Settings.model_fields.get("rewards")
    return field is not None and field.annotation is RewardsSettings


def reward_run_folder(source: RewardSource, *, where: str) -> Path:
    """Return the folder of a source's finished run.

    Raises:
        UserError: there is no such run, or it is a recipe that has not run yet.
    """
    assert source.run is not None
    if is_recipe_name(source.run):
        repair = f"run `{command_line(*source.run.split('/', 1))}` first"
        actual = f"'{source.run}' is a recipe without a finished run"
        raise UserError(Problem(where, actual, "a finished run", repair))
    return find_run(source.run, where=where)[0]


def _combination_problems(rewards: RewardsSettings) -> Iterator[Problem]:
    sources = rewards.sources
    if not sources:
        repair = "--reward RUN, or rewards.sources=[{function: my.py:good}]"
        yield Problem("rewards.sources", "no reward is given", "a reward run or a function", repair)
    names = sorted(source.metric_name for source in sources)
    if rewards.combine == "llama2" and names != [HELPFULNESS, SAFETY]:
        actual = f"llama2 with {', '.join(names) or 'no source'}"
        repair = "rewards.sources=[{run: R, score: helpfulness}, {run: S, score: safety}], or set their name:"
        yield Problem("rewards.combine", actual, "two sources named helpfulness and safety", repair)
    if rewards.combine == "llama2" and any(source.weight != 1 for source in sources):
        actual = "llama2 with weights: it takes one score or the other"
        yield Problem("rewards.combine", actual, "weights of 1", "rewards.combine=sum, or remove weight:")
    if rewards.combine == "sum" and rewards.unsafe_prompt_fn is not None:
        yield Problem(
            "rewards.unsafe_prompt_fn", "given with rewards.combine=sum", "null", "rewards.combine=llama2"
        )
    if sources and not any(source.weight for source in sources):
        yield Problem("rewards.sources", "all weights are 0", "a weight above 0", "remove a weight:")


def _duplicate_name_problems(rewards: RewardsSettings) -> Iterator[Problem]:
    # The metrics of the length penalty and of the total have these names.
    names = Counter([*(source.metric_name for source in rewards.sources), LENGTH_PENALTY, RESERVED_TOTAL])
    for index, source in enumerate(rewards.sources):
        if names[source.metric_name] > 1:
            where, actual = f"rewards.sources[{index}].name", f"duplicate name '{source.metric_name}'"
            yield Problem(where, actual, "unique names", "set name: of each source")


def _source_problems(source: RewardSource, where: str) -> Iterator[Problem]:
    if (source.run is None) == (source.function is None):
        actual = (
            "neither run nor function is given" if source.run is None else "both run and function are given"
        )
        yield Problem(where, actual, "exactly one of run and function")
    elif source.function is not None:
        yield from _reward_function_problems(source.function, f"{where}.function")
        if source.score is not None:
            yield Problem(f"{where}.score", "given with a function", "null: a function has a single score")
    else:
        yield from _score_problems(source, where)


def _reward_function_problems(text: str | PythonFunction, where: str) -> list[Problem]:
    try:
        function = load_user_function(text, where=where)
    except UserError as error:
        return error.problems
    return signature_problems(function, ROW_NAMES, where=where, has_columns=True)


def _function_problems(text: str | PythonFunction, arguments: tuple[str, ...], where: str) -> list[Problem]:
    try:
        return signature_problems(load_user_function(text, where=where), arguments, where=where)
    except UserError as error:
        return error.problems


def _score_problems(source: RewardSource, where: str) -> Iterator[Problem]:
    assert source.run is not None
    try:
        info = reward_run_info(source.run, where=f"{where}.run")
    except UserError as error:
        hint = did_you_mean(source.run, grader_names())
        yield from (replace(problem, repair=hint or problem.repair) for problem in error.problems)
        return
    if source.score is not None and source.score not in info.score_names:
        actual = f"'{source.run}' has no score '{source.score}'"
        suggestion = did_you_mean(source.score, info.score_names)
        yield Problem(f"{where}.score", actual, one_of(info.score_names), suggestion)


class RewardSections(Protocol):
    """The sections of a stage that the rules of rewards read."""

    model: ModelSettings
    data: DataSettings
    rewards: RewardsSettings


def _adapter_runs(settings: RewardSections) -> Iterator[tuple[str, str, RewardRunInfo]]:
    """Yield the reward runs that share the policy's base: place, name, and what is known of it."""
    for index, source in enumerate(settings.rewards.sources):
        where = f"rewards.sources[{index}].run"
        if source.run is None or source.function is not None:
            continue
        try:
            info = reward_run_info(source.run, where=where)
        except UserError:
            continue  # reported by `_check_rewards`
        # A fully fine-tuned reward model brings its own base and template.
        if not info.full_model:
            yield where, source.run, info


def _check_rewards(settings: RewardSections) -> Iterator[Problem]:
    rewards = settings.rewards
    yield from _combination_problems(rewards)
    yield from _duplicate_name_problems(rewards)
    if rewards.unsafe_prompt_fn is not None:
        yield from _function_problems(rewards.unsafe_prompt_fn, ("prompt",), "rewards.unsafe_prompt_fn")
    for index, source in enumerate(rewards.sources):
        yield from _source_problems(source, f"rewards.sources[{index}]")


def _check_bases(settings: RewardSections) -> Iterator[Problem]:
    policy = settings.model
    for where, run, info in _adapter_runs(settings):
        if not same_base(policy, info.model):
            actual = f"'{run}' is on base '{info.model.base}', the policy on '{policy.base}'"
            expected = "a reward run on the policy's base, as they share its weights"
            command = command_line("reward", "--base", policy.base)
            repair = f"`{command}` trains one; or use a policy on {info.model.base}"
            yield Problem(where, actual, expected, repair)


def _check_templates(settings: RewardSections) -> Iterator[Problem]:
    template = settings.data.template
    for where, run, info in _adapter_runs(settings):
        # Of a reward run on another base that is said alone.
        if info.template != template and same_base(settings.model, info.model):
            actual = f"'{run}' has template '{info.template}', the policy has '{template}'"
            repair = f"data.template={info.template}, or a reward run with data.template={template}"
            yield Problem(where, actual, "the same template for both", repair)


REWARD_RULES = (
    Rule(
        "rewards",
        message="each reward is a finished run or an existing function, with a unique name",
        source="align/rl/rewards",
        find=_check_rewards,
        reads=("rewards",),
    ),
    Rule(
        "reward-base",
        message="reward models share the policy's base in memory",
        source="align/reward/shared_base.py",
        find=_check_bases,
        reads=("rewards", "model"),
    ),
    Rule(
        "reward-template",
        message="reward models have the template of the policy, whose text they score",
        source="align/reward/shared_base.py",
        find=_check_templates,
        reads=("rewards", "data"),
    ),
    Rule(
        "reward-models-sharded",
        {"train.strategy": SHARDED_WEIGHTS},
        "reward and value models share the policy's base in memory, which would be sharded; ZeRO-2 "
        "replicates the weights",
        source="ppo on two CPU ranks with ZeRO-3: Cannot copy out of meta tensor "
        "(align/reward/shared_base.py); the other stages load their rewards in the same way",
        evidence="run",
        changes={"train.strategy": "zero2"},
    ),
)
"""Rules of every stage with rewards."""
