"""Recipe section of the rewards in RL stages: reward runs and functions, weights, combination."""

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
"""Name of the optional third parameter of a reward function: the row's reference answer."""
HELPFULNESS, SAFETY = "helpfulness", "safety"
"""Names of the two sources that ``combine: llama2`` requires."""


class RewardSource(Section):
    """One reward: a finished reward run, or a Python function."""

    PLACES: ClassVar[tuple[str, ...]] = ("run",)

    run: Text | None = Field(
        None,
        description="finished run of stage reward: its folder, or its name (or a prefix) in ./runs; "
        "or reward/RECIPE, which is run first if it has no finished run",
    )
    score: Text | None = Field(
        None, description="which score of the run: name of a head or a rule; null: their total"
    )
    function: Text | None = Field(
        None,
        description="path/to/file.py:function; (prompt, completion) -> number or bool; a third "
        "parameter `expected` receives the row's reference answer",
    )
    name: Text | None = Field(None, description="name in metrics; null: name of the score or function")
    weight: float = Field(1.0, description="weight in the sum; 0: logged only")

    @property
    def called(self) -> str:
        """Return the name in metrics and messages."""
        if self.function is not None:
            return self.name or self.function.rpartition(":")[2]
        return self.name or self.score or LONE_HEAD


def _sources(value: Any) -> Any:
    """Return sources as a list of mappings; a string is a run, or a function if it contains ``.py:``."""
    parts = value if isinstance(value, list) else [value]
    return [
        {"function" if ".py:" in part else "run": part} if isinstance(part, str) else part for part in parts
    ]


Sources = Annotated[
    list[RewardSource],
    BeforeValidator(_sources, json_schema_input_type=list[RewardSource | Text] | RewardSource | Text),
]


class RewardsSettings(Section):
    """The rewards to maximize."""

    sources: Sources = Field(
        [],
        description="rewards: a reward run, file.py:function, or a list of these; each may be "
        "{run: R, score: S, name: N, weight: W} or {function: F, ...}",
    )
    # Llama 2 (arXiv 2307.09288), section 3.2.3; weighted sums as in Sparrow (arXiv 2209.14375), section 2.6.
    combine: Literal["sum", "llama2"] = Field(
        "sum",
        description="weighted sum; or llama2: safety if the prompt or the reply is unsafe, else helpfulness",
    )
    risky: Text | None = Field(
        None, description="for llama2: file.py:function; (prompt) -> bool, whether the prompt is unsafe"
    )
    # Llama 2 (arXiv 2307.09288), section 3.2.3: 0.15, on the sigmoid of the safety model's score.
    risky_below: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="for llama2: a reply is unsafe if the sigmoid of its safety score is below this"
    )
    length_penalty: Annotated[float, Field(ge=0)] = Field(
        0.0, description="penalty per token of a reply beyond length_free"
    )
    length_free: Count = Field(0, description="tokens of a reply without length penalty")

    def problems(self, stage: StageSettings, valid: Collection[str]) -> list[Problem]:
        """Return every problem that can be found before anything is loaded; executes the functions' files.

        Args:
            stage: the recipe of these settings.
            valid: names of its valid sections.
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
        """Return digests of the reward runs and of the functions' files.

        Raises:
            UserError: a run is missing or not finished, or a file is missing.
        """
        found = []
        for index, source in enumerate(self.sources):
            where = f"reward.sources[{index}]"
            if source.function is not None:
                found.append(file_digest(source.function, where=f"{where}.function"))
            else:
                record = finished_record(folder_of(source, where=f"{where}.run"))
                # Normalization is part of it: it changes the scores.
                kept = [record["digest"], record["files"], record["normalisation"]]
                found.append(hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest())
        return found + ([file_digest(self.risky, where="reward.risky")] if self.risky is not None else [])


def maximises_rewards(stage: str) -> bool:
    """Return whether a stage has a rewards section."""
    field = load_stage(stage).Settings.model_fields.get("reward")
    return field is not None and field.annotation is RewardsSettings


def folder_of(source: RewardSource, *, where: str) -> Path:
    """Return the folder of a source's finished run.

    Raises:
        UserError: there is no such run, or it is a recipe that has not run yet.
    """
    assert source.run is not None
    if is_recipe(source.run):
        repair = f"run `llm-align {source.run.replace('/', ' ')}` first"
        found = f"'{source.run}' is a recipe without a finished run"
        raise UserError(Problem(where, found, "a finished run", repair))
    return find_run(source.run, where=where)[0]


def _combination(rewards: RewardsSettings) -> Iterator[Problem]:
    sources = rewards.sources
    if not sources:
        repair = "--reward RUN, or reward.sources=[{function: my.py:good}]"
        yield Problem("reward.sources", "no reward is given", "a reward run or a function", repair)
    names = sorted(source.called for source in sources)
    if rewards.combine == "llama2" and names != [HELPFULNESS, SAFETY]:
        found = f"llama2 with {', '.join(names) or 'no source'}"
        repair = "reward.sources=[{run: R, score: helpfulness}, {run: S, score: safety}], or set their name:"
        yield Problem("reward.combine", found, "two sources named helpfulness and safety", repair)
    if rewards.combine == "llama2" and any(source.weight != 1 for source in sources):
        found = "llama2 with weights: it takes one score or the other"
        yield Problem("reward.combine", found, "weights of 1", "reward.combine=sum, or remove weight:")
    if rewards.combine == "sum" and rewards.risky is not None:
        yield Problem("reward.risky", "given with reward.combine=sum", "null", "reward.combine=llama2")
    if sources and not any(source.weight for source in sources):
        yield Problem("reward.sources", "all weights are 0", "a weight above 0", "remove a weight:")


def _names(rewards: RewardsSettings) -> Iterator[Problem]:
    # The metrics of the length penalty and of the total have these names.
    names = Counter([*(source.called for source in rewards.sources), LENGTH, TOTAL])
    for index, source in enumerate(rewards.sources):
        if names[source.called] > 1:
            where, found = f"reward.sources[{index}].name", f"duplicate name '{source.called}'"
            yield Problem(where, found, "unique names", "set name: of each source")


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
            yield Problem(f"{where}.score", "given with a function", "null: a function has a single score")
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
    # A fully fine-tuned reward model brings its own base and template.
    if scorer.whole:
        return
    mine, theirs = stage.model, scorer.model
    if "model" in valid and not same_base(mine, theirs):
        found = f"'{source.run}' is on base '{theirs.base}', the policy on '{mine.base}'"
        repair = f"`llm-align reward --base {mine.base}` trains one; or use a policy on {theirs.base}"
        yield Problem(
            f"{where}.run", found, "a reward run on the policy's base, as they share its weights", repair
        )
    elif "data" in valid and scorer.template != stage.data.template:
        found = f"'{source.run}' has template '{scorer.template}', the policy has '{stage.data.template}'"
        repair = f"data.template={scorer.template}, or a reward run with data.template={stage.data.template}"
        yield Problem(f"{where}.run", found, "the same template for both", repair)
