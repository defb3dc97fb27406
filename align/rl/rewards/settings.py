"""What an RL stage maximises: reward runs and programs, how many times each counts, and how they combine."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from align.reward.settings import ARGUMENTS
from align.rl.rewards.scorers import LONE_HEAD, same_base, scorer_of
from finetune.recipe.discovery import load_stage
from finetune.recipe.errors import Problem, UserError, nearest, one_of
from finetune.recipe.python_function import call_problems, file_digest, has_parameter, load_function
from finetune.recipe.runs import find_run, finished_record
from finetune.recipe.settings import Count, Section, StageSettings, Text
from finetune.recipe.start import is_recipe

LENGTH, TOTAL = "length_penalty", "total"
EXPECTED = "expected"
"""The third parameter of a program that is told the row's own reply."""
HELPFULNESS, SAFETY = "helpfulness", "safety"
"""The names of the two sources that ``llama2`` combines."""


class RewardSource(Section):
    """One reward: a finished reward run, or a program."""

    PLACES: ClassVar[tuple[str, ...]] = ("run",)

    run: Text | None = Field(
        None,
        description="finished run of stage reward: its folder, its name below ./runs or the beginning of it; "
        "or reward/recipe (reward/quickstart), which runs first if need be",
    )
    score: Text | None = Field(
        None, description="which of the run's scores: a head's name, a rule's; null: all together (total)"
    )
    function: Text | None = Field(
        None,
        description="path/to/file.py:function; (prompt, completion) -> a number or a truth; with a third "
        "parameter `expected` it is told the row's own reply",
    )
    name: Text | None = Field(
        None, description="what it is called in metrics; null: the score's name, or the function's"
    )
    weight: float = Field(1.0, description="it counts this many times; 0: it is watched alone")

    @property
    def called(self) -> str:
        """Return what it is called in metrics and messages."""
        if self.function is not None:
            return self.name or self.function.rpartition(":")[2]
        return self.name or self.score or LONE_HEAD


def _sources(value: Any) -> Any:
    """Return sources as a list of mappings; a name stands for a run, ``file.py:function`` for a program."""
    parts = value if isinstance(value, list) else [value]
    return [
        {"function" if ".py:" in part else "run": part} if isinstance(part, str) else part for part in parts
    ]


Sources = Annotated[
    list[RewardSource],
    BeforeValidator(_sources, json_schema_input_type=list[RewardSource | Text] | RewardSource | Text),
]


class RewardsSettings(Section):
    """What replies are worth."""

    sources: Sources = Field(
        [],
        description="what replies are worth: a reward run, file.py:function, or a list of these; each may be "
        "{run: R, score: S, name: N, weight: W} or {function: F, ...}",
    )
    # Llama 2 (arXiv 2307.09288), section 3.2.3; weighted sums as in Sparrow (arXiv 2209.14375), section 2.6.
    combine: Literal["sum", "llama2"] = Field(
        "sum",
        description="weighted sum; or llama2: safety where the prompt or the reply is risky, else help",
    )
    risky: Text | None = Field(
        None, description="for llama2: file.py:function; (prompt) -> does it ask for something unsafe?"
    )
    # Llama 2 (arXiv 2307.09288), section 3.2.3: 0.15, on the sigmoid of the safety model's score.
    risky_below: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="for llama2: a reply is risky where the sigmoid of its safety score is below this"
    )
    length_penalty: Annotated[float, Field(ge=0)] = Field(
        0.0, description="taken off for each token of a reply beyond length_free"
    )
    length_free: Count = Field(0, description="tokens of a reply that cost nothing")

    def problems(self, stage: StageSettings, valid: Collection[str]) -> list[Problem]:
        """Return every mistake that can be found before anything is loaded; programs' files are executed.

        Args:
            stage: the recipe that these settings belong to.
            valid: its sections that are in order.
        """
        if "reward" not in valid:
            return []
        problems = [*_combination(self), *_names(self)]
        if self.risky is not None:
            problems += _program(self.risky, ("prompt",), "reward.risky")
        for index, source in enumerate(self.sources):
            problems += _source(source, stage, valid, where=f"reward.sources[{index}]")
        return problems

    def made_of(self) -> list[str]:
        """Return digests of the reward runs and of the programs' files.

        Raises:
            UserError: a run is not there or not finished, or a file is gone.
        """
        found = []
        for index, source in enumerate(self.sources):
            where = f"reward.sources[{index}]"
            if source.function is not None:
                found.append(file_digest(source.function, where=f"{where}.function"))
            else:
                record = finished_record(folder_of(source, where=f"{where}.run"))
                kept = [record["digest"], record["files"], record["normalisation"]]
                found.append(hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest())
        return found + ([file_digest(self.risky, where="reward.risky")] if self.risky is not None else [])


def maximises_rewards(stage: str) -> bool:
    """Tell whether a stage's recipe names rewards."""
    field = load_stage(stage).Settings.model_fields.get("reward")
    return field is not None and field.annotation is RewardsSettings


def folder_of(source: RewardSource, *, where: str) -> Path:
    """Return the folder of a source's finished run.

    Raises:
        UserError: there is no such run, or it is a recipe whose run has not been made.
    """
    assert source.run is not None
    if is_recipe(source.run):
        repair = f"`llm-align {source.run.replace('/', ' ')}` makes it"
        found = f"'{source.run}' is a recipe, and nobody has made its run"
        raise UserError(Problem(where, found, "a finished run", repair))
    return find_run(source.run, where=where)[0]


def _combination(rewards: RewardsSettings) -> Iterator[Problem]:
    sources = rewards.sources
    if not sources:
        repair = "--reward RUN, or reward.sources=[{function: my.py:good}]"
        yield Problem(
            "reward.sources", "nothing says what a reply is worth", "a reward run or a program", repair
        )
    names = sorted(source.called for source in sources)
    if rewards.combine == "llama2" and names != [HELPFULNESS, SAFETY]:
        found = f"llama2 with {', '.join(names) or 'no source'}"
        repair = (
            "reward.sources=[{run: R, score: helpfulness}, {run: S, score: safety}], or give them a name:"
        )
        yield Problem("reward.combine", found, "two sources called helpfulness and safety", repair)
    if rewards.combine == "llama2" and any(source.weight != 1 for source in sources):
        found = "llama2 with weights, and it takes one score or the other"
        yield Problem("reward.combine", found, "weights of 1", "reward.combine=sum, or leave weight: out")
    if rewards.combine == "sum" and rewards.risky is not None:
        yield Problem("reward.risky", "given with reward.combine=sum", "null", "reward.combine=llama2")
    if sources and not any(source.weight for source in sources):
        yield Problem("reward.sources", "each weight is 0", "a reward that counts", "leave a weight: out")


def _names(rewards: RewardsSettings) -> Iterator[Problem]:
    names = Counter([*(source.called for source in rewards.sources), LENGTH, TOTAL])
    for index, source in enumerate(rewards.sources):
        if names[source.called] > 1:
            where, found = f"reward.sources[{index}].name", f"'{source.called}' is there twice"
            yield Problem(where, found, "names that differ", "give each source a name: of its own")


def _source(
    source: RewardSource, stage: StageSettings, valid: Collection[str], *, where: str
) -> Iterator[Problem]:
    if (source.run is None) == (source.function is None):
        found = (
            "neither run nor function is given" if source.run is None else "both run and function are given"
        )
        yield Problem(where, found, "exactly one of run and function")
    elif source.function is not None:
        yield from _reward_program(source.function, f"{where}.function")
        if source.score is not None:
            yield Problem(f"{where}.score", "given with a function", "null: a function has one number")
    else:
        yield from _run(source, stage, valid, where)


def _reward_program(text: str, where: str) -> list[Problem]:
    try:
        answered = has_parameter(load_function(text, where=where), EXPECTED)
    except UserError as error:
        return error.problems
    return _program(text, (*ARGUMENTS, EXPECTED) if answered else ARGUMENTS, where)


def _program(text: str, arguments: tuple[str, ...], where: str) -> list[Problem]:
    try:
        return call_problems(load_function(text, where=where), arguments, where=where)
    except UserError as error:
        return error.problems


def _run(source: RewardSource, stage: StageSettings, valid: Collection[str], where: str) -> Iterator[Problem]:
    assert source.run is not None
    try:
        scorer = scorer_of(source.run, where=f"{where}.run")
    except UserError as error:
        yield from error.problems
        return
    if source.score is not None and source.score not in scorer.scores:
        found, close = f"'{source.run}' has no score '{source.score}'", nearest(source.score, scorer.scores)
        yield Problem(f"{where}.score", found, one_of(scorer.scores), close)
    if scorer.whole:
        return
    mine, theirs = stage.model, scorer.model
    if "model" in valid and not same_base(mine, theirs):
        found = f"'{source.run}' scores on base '{theirs.base}', and the policy is '{mine.base}'"
        repair = f"llm-align reward --base {mine.base} makes one; or start from a run on {theirs.base}"
        yield Problem(
            f"{where}.run", found, "a reward run on the policy's base, whose weights they share", repair
        )
    elif "data" in valid and scorer.template != stage.data.template:
        found = (
            f"'{source.run}' has learnt template '{scorer.template}', the policy has '{stage.data.template}'"
        )
        repair = f"data.template={scorer.template}, or a reward run with data.template={stage.data.template}"
        yield Problem(f"{where}.run", found, "one template for both", repair)
