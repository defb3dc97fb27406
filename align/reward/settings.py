"""A reward model's settings: its heads and their data, and the rules that stand beside them."""

from collections.abc import Collection, Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from align.preference.settings import PreferenceSettings
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem, UserError, nearest, one_of
from finetune.recipe.python_function import call_problems, file_digest, load_function
from finetune.recipe.settings import MixedSource, Section, StageSettings, Text

ARGUMENTS = ("prompt", "completion")
"""What a rule is called with."""


class RewardSource(MixedSource):
    """One source of a mixture, and the head that learns from it."""

    head: Text | None = Field(None, description="head that learns from it; null: the only one")


class RewardData(PreferenceSettings):
    """What is preferred to what, and which head learns it."""

    mix: Annotated[list[RewardSource], Field(min_length=1)] | None = Field(  # type: ignore[assignment]
        None, description="several sources in place of `source`; each may name the head that learns from it"
    )


class RuleSettings(Section):
    """A reward that is a program."""

    name: Text = Field(description="what it is called in the scores")
    function: Text = Field(
        description="path/to/file.py:function; (prompt, completion) -> a number or a truth"
    )
    weight: float = Field(1.0, description="it counts this many times in the sum of all rewards")


class RewardSettings(Section):
    """Heads, what the loss adds to plain Bradley-Terry, and rules."""

    heads: Annotated[list[Text], Field(min_length=1)] = Field(
        ["reward"], description="names of the scores that one base gives, each learnt from its own sources"
    )
    # arXiv 2312.09244, equation 2; TRL's documentation recommends 0.01. A bias is taken off later anyway.
    centring: Annotated[float, Field(ge=0)] = Field(
        0.0, description="coefficient that draws rewards to a mean of 0 (0.01); 0: none"
    )
    # Llama 2 (arXiv 2307.09288), equation 2 and table 27: 0 to 1 (small) or 0 to 3 (large).
    margins: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the loss asks for the data's margin times this between two scores; null: for none"
    )
    rules: list[RuleSettings] = Field(
        [], description="programs beside the heads: [{name: N, function: file.py:function, weight: 1.0}]"
    )

    def made_of(self) -> list[str]:
        """Return the digests of the rules' files."""
        return [file_digest(rule.function, where=f"rule '{rule.name}'") for rule in self.rules]


class Settings(StageSettings):
    """The sections of a reward model's recipe."""

    TRL_CONFIG: ClassVar[str] = "RewardConfig"

    data: RewardData = RewardData()
    reward: RewardSettings = RewardSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return what contradicts itself for this stage; the files of rules are executed for it."""
        found = [*_unused(self), *(_adapter(self) if "adapter" in valid else [])]
        found += _heads(self) if {"data", "reward"} <= set(valid) else []
        return found + (list(_rules(self.reward)) if "reward" in valid else [])


def heads_of(settings: Settings) -> list[int]:
    """Return for each source of the data the number of the head that learns from it."""
    names = settings.reward.heads
    parts = settings.data.mix
    return [0] if parts is None else [names.index(part.head or names[0]) for part in parts]


def _unused(settings: Settings) -> Iterator[Problem]:
    """Yield settings of other stages that would change nothing here."""
    train, evaluate = settings.train, settings.evaluate
    if train.engine == "trl" and len(settings.reward.heads) > 1:
        found = f"'trl' with {len(settings.reward.heads)} heads"
        yield Problem("train.engine", found, "native: TRL's trainer has one score", "train.engine=native")
    given = {
        "train.label_smoothing": train.label_smoothing != 0,
        "train.neftune_alpha": train.neftune_alpha is not None,
        "data.packing": settings.data.packing,
        "evaluate.exact_match": evaluate.exact_match != 0,
        "evaluate.judges": bool(evaluate.judges),
        "evaluate.skill": evaluate.skill is not None,
    }
    for where in (name for name, wanted in given.items() if wanted):
        reason = "not for a reward model: completions share their prompt's line anyway"
        if where != "data.packing":
            reason = "not for a reward model, which writes no text"
        yield Problem(where, "given", reason, "leave it out")


def _adapter(settings: Settings) -> Iterator[Problem]:
    method = settings.adapter.method
    if reason := adapter_traits(method).scores:
        repair = "adapter.method=lora, or another one of `llm-align list adapters`"
        yield Problem("adapter.method", f"'{method}': {reason}", "an adapter that scores", repair)


def _heads(settings: Settings) -> Iterator[Problem]:
    names, parts = settings.reward.heads, settings.data.mix
    if len(set(names)) < len(names):
        yield Problem("reward.heads", f"found {', '.join(names)}", "names that differ")
    if len(names) == 1 and not any(part.head for part in parts or []):
        return
    if parts is None:
        repair = "data.mix=[{source: ..., head: NAME}, ...]"
        found = f"{len(names)} heads, and data.source is one source"
        yield Problem("reward.heads", found, "sources in data.mix, each with its head", repair)
        return
    for index, part in enumerate(parts):
        where = f"data.mix[{index}].head"
        if part.head is None:
            found = f"not given, and there are {len(names)} heads"
            yield Problem(where, found, one_of(names), "say which head learns from this source")
        elif part.head not in names:
            found = f"'{part.head}' is no head"
            repair = nearest(part.head, names) or "or add it to reward.heads"
            yield Problem(where, found, f"{one_of(names)} (reward.heads)", repair)
    if idle := [name for name in names if name not in {part.head for part in parts}]:
        found = f"nothing is learnt by {', '.join(idle)}"
        yield Problem("reward.heads", found, "a source of data.mix for every head", "add head: to a source")
    if isinstance(settings.data.held_out, str):
        found = "a file, and its rows name no head"
        yield Problem("data.held_out", found, "rows (100) or a share (0.1), taken of every source")


def _rules(reward: RewardSettings) -> Iterator[Problem]:
    names = [*reward.heads, *(rule.name for rule in reward.rules), "total"]
    for index, rule in enumerate(reward.rules):
        where = f"reward.rules[{index}]"
        if names.count(rule.name) > 1:
            yield Problem(f"{where}.name", f"'{rule.name}' is there twice", "names that differ")
        try:
            function = load_function(rule.function, where=f"{where}.function")
        except UserError as error:
            yield from error.problems
        else:
            yield from call_problems(function, ARGUMENTS, where=f"{where}.function")
