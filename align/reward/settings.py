"""Recipe settings of stage `reward`: heads and their data sources, loss terms, functions, and rules."""

from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from align.preference.settings import PREFERENCE_SELECT, PROMPT_LENGTH, PreferenceSettings
from finetune.recipe.compatibility import Condition, Rule, is_set
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.settings import (
    FiniteFloat,
    MixedSource,
    NonEmptyStr,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    StageSettings,
    TrainSettings,
)
from finetune.recipe.user_arguments import signature_problems
from finetune.recipe.user_function import load_user_function

RULE_ARGUMENTS = ("prompt", "completion")
"""Arguments of a rule function."""


class HeadDataSource(MixedSource):
    """One source of a data mixture, and the head trained on it."""

    head: NonEmptyStr | None = Field(None, description="head trained on this source; null: the only head")


class RewardData(PreferenceSettings):
    """Preference data, and the head trained on each source."""

    mix: Annotated[list[HeadDataSource], Field(min_length=1)] | None = Field(  # type: ignore[assignment]
        None, description="several sources instead of `source`; each may name the head trained on it"
    )


class RuleSettings(Section):
    """A Python reward function."""

    name: NonEmptyStr = Field(description="name of its score")
    function: NonEmptyStr = Field(
        description="path/to/file.py:function; (prompt, completion) -> number or bool"
    )
    weight: FiniteFloat = Field(1.0, description="weight in the total reward")


class RewardSettings(Section):
    """Heads, terms added to the Bradley-Terry loss, and rules."""

    heads: Annotated[list[NonEmptyStr], Field(min_length=1)] = Field(
        ["reward"], description="names of the score heads; each is trained on its own sources"
    )
    # arXiv 2312.09244, equation 2; TRL recommends 0.01. Off: rewards are normalized after training anyway.
    center_rewards_coefficient: NonNegativeFloat = Field(
        0.0, description="weight of the term that centers rewards at 0 (e.g. 0.01); 0: off"
    )
    # Llama 2 (arXiv 2307.09288), equation 2 and table 27: 0 to 1 (small) or 0 to 3 (large).
    margin_scale: PositiveFloat | None = Field(
        None, description="factor for the data's margins, which the loss subtracts; null: no margins"
    )
    rules: list[RuleSettings] = Field(
        [], description="Python reward functions: [{name: N, function: file.py:function, weight: 1.0}]"
    )

    def input_digests(self, function_digest: Callable[..., str]) -> list[str]:
        """Return the digests of the rules' files, part of the run's fingerprint."""
        return [function_digest(rule.function, where=f"rule '{rule.name}'") for rule in self.rules]


class RewardTrainSettings(TrainSettings):
    """Training settings of a reward model."""

    # TRL 1.16, RewardConfig and examples/scripts/reward_modeling.py: with LoRA. For all weights 1e-5 (arXiv
    # 2307.09288, section 3.2.2: 5e-6 to 1e-5).
    learning_rate: PositiveFloat = Field(1e-4, description="peak learning rate")


class Settings(StageSettings):
    """The sections of a reward recipe."""

    TRL_CONFIG: ClassVar[str] = "RewardConfig"

    data: RewardData = RewardData()
    train: RewardTrainSettings = RewardTrainSettings()
    reward: RewardSettings = RewardSettings()


def head_indices(settings: Settings) -> list[int]:
    """Return the index of the head trained on each data source."""
    names = settings.reward.heads
    sources = settings.data.mix
    return [0] if sources is None else [names.index(source.head or names[0]) for source in sources]


def _several(names: list[str]) -> bool:
    return len(names) > 1


def _check_heads(settings: Settings) -> Iterator[Problem]:
    names, sources = settings.reward.heads, settings.data.mix
    if len(set(names)) < len(names):
        yield Problem("reward.heads", f"duplicate names: {', '.join(names)}", "unique names")
    if len(names) == 1 and not any(source.head for source in sources or []):
        return
    if sources is None:
        repair = "data.mix=[{source: ..., head: NAME}, ...]"
        actual = f"{len(names)} heads, but data.source is a single source"
        yield Problem("reward.heads", actual, "sources in data.mix, each with a head", repair)
        return
    for index, source in enumerate(sources):
        where = f"data.mix[{index}].head"
        if source.head is None:
            actual = f"missing, and there are {len(names)} heads"
            yield Problem(where, actual, one_of(names), "set the head to train on this source")
        elif source.head not in names:
            actual = f"unknown head '{source.head}'"
            repair = did_you_mean(source.head, names) or "add it to reward.heads"
            yield Problem(where, actual, f"{one_of(names)} (reward.heads)", repair)
    if idle := [name for name in names if name not in {source.head for source in sources}]:
        actual = f"no data source for {', '.join(idle)}"
        yield Problem("reward.heads", actual, "a source in data.mix for every head", "set `head` on a source")
    if isinstance(settings.data.held_out, str | PythonRows):
        actual = "a file, whose rows have no head"
        yield Problem(
            "data.held_out", actual, "a number of rows (100) or a fraction (0.1), taken from every source"
        )


def _check_reward_functions(settings: Settings) -> Iterator[Problem]:
    reward = settings.reward
    names = [*reward.heads, *(rule.name for rule in reward.rules), "total"]
    for index, rule in enumerate(reward.rules):
        where = f"reward.rules[{index}]"
        if names.count(rule.name) > 1:
            yield Problem(f"{where}.name", f"duplicate name '{rule.name}'", "unique names")
        try:
            function = load_user_function(rule.function, where=f"{where}.function")
        except UserError as error:
            yield from error.problems
        else:
            yield from signature_problems(function, RULE_ARGUMENTS, where=f"{where}.function")


def _without_effect(key: str, is_given: Condition, why: str) -> Rule:
    """Return the rule of a setting that has no effect in this stage."""
    name = f"reward-{key.partition('.')[2].replace('_', '-')}"
    return Rule(name, {key: is_given}, source="align/reward", problem=Problem(key, "set", why, "remove it"))


NO_TEXT = "not supported for reward models, which generate no text"
SHARED_ROW = "not supported for reward models: completions already share their prompt's row"

RULES = (
    PREFERENCE_SELECT,
    PROMPT_LENGTH,
    Rule(
        "trl-single-head",
        {"train.engine": ("trl",), "reward.heads": _several},
        "TRL's RewardTrainer has a single score",
        source="trl 1.16, trainer/reward_trainer.py: num_labels=1",
        problem=Problem(
            "train.engine",
            "'trl' with {reward.heads:count} heads",
            "native: TRL's RewardTrainer has a single score",
            "train.engine=native",
        ),
    ),
    _without_effect("train.label_smoothing", bool, NO_TEXT),
    _without_effect("train.neftune_alpha", is_set, NO_TEXT),
    _without_effect("data.packing", (True,), SHARED_ROW),
    _without_effect("evaluate.exact_match", bool, NO_TEXT),
    _without_effect("evaluate.graders", bool, NO_TEXT),
    _without_effect("evaluate.retention", is_set, NO_TEXT),
    Rule(
        "reward-head",
        {"traits.scoring_unsupported": bool},
        "PEFT cannot save a reward head with this adapter",
        source="finetune/adapters/*.py, TRAITS.scoring_unsupported",
        repair="another adapter of `llm-align list adapters`, such as lora",
        problem=Problem(
            "adapter.method",
            "'{adapter.method}': {traits.scoring_unsupported}",
            "an adapter that supports reward models",
            "adapter.method=lora, or another one of `llm-align list adapters`",
        ),
    ),
    Rule(
        "reward-heads",
        message="every head has a unique name and a source in data.mix",
        source="align/reward/batch.py",
        find=_check_heads,
        reads=("data", "reward"),
    ),
    Rule(
        "reward-functions",
        message="reward functions exist and have unique names",
        source="align/reward/function_reward.py",
        find=_check_reward_functions,
        reads=("reward",),
    ),
)
