"""One stage of a pipeline as it is asked for, and the recipe that it comes to."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from align.pipeline.settings import REWARDS
from align.rl.rewards.scorers import pending as pending_scorers
from finetune.recipe import yaml_file
from finetune.recipe.command_line import COMMAND_LINE
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe, load, stage_settings
from finetune.recipe.start import SCORERS

START, BASE = "model.start", "model.base"


@dataclass(frozen=True)
class Entry:
    """One stage of a pipeline.

    Attributes:
        name: what the pipeline calls it.
        stage: the stage that runs it.
        recipe: the recipe's name, or its path.
        start: the name of the stage whose model goes on; None where it begins with a base.
        rewards: the names of the stages whose models give the rewards.
        given: settings in place of the recipe's, by ``section.key``.
        origins: where these stand, by ``section.key``; ``model.start`` and ``reward.sources`` too.
    """

    name: str
    stage: str
    recipe: str
    start: str | None = None
    rewards: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return ``stage/recipe``, or the path of a recipe that has no place of its own."""
        return f"{self.stage} {self.recipe}" if "/" in self.recipe else f"{self.stage}/{self.recipe}"

    @property
    def scores(self) -> bool:
        """Tell whether its model gives scores and writes no text."""
        return self.stage in SCORERS

    @property
    def takes_rewards(self) -> bool:
        """Tell whether the stage learns from rewards."""
        section, key = REWARDS.split(".")
        known = stage_settings(self.stage).model_fields
        return section in known and key in known[section].annotation.model_fields  # type: ignore[union-attr]

    def load(
        self,
        *,
        start: str | None,
        rewards: Mapping[str, str],
        pending: Mapping[str, Recipe] | None = None,
    ) -> Recipe:
        """Load the recipe with what the pipeline says.

        Args:
            start: what ``model.start`` becomes; None where the recipe says it.
            rewards: the run that each name of ``rewards`` means.
            pending: recipes whose runs are still to be made, by what ``start`` and ``rewards`` call them.

        Raises:
            UserError: every mistake that could be found, each with the stage's name before it.
        """
        shortcuts = self._shortcuts(start, rewards)
        try:
            with pending_scorers(pending or {}):
                recipe = load(self.stage, self.recipe, shortcuts=shortcuts, pending=pending)
        except UserError as error:
            raise UserError([self.placed(problem) for problem in error.problems]) from error
        return replace(recipe, origins={**recipe.origins, **dict(self._origins(recipe))})

    def placed(self, problem: Problem) -> Problem:
        """Return a problem with the stage's name before its place, and with the pipeline's own line."""
        where = problem.where
        if where.startswith(f"stage {self.name}: "):
            return problem
        key = where.removesuffix(f" ({COMMAND_LINE})").strip("'")
        if key != where.strip("'"):
            place = next((self.origins[own] for own in self.origins if key.startswith(own)), COMMAND_LINE)
            where = where.replace(f"({COMMAND_LINE})", f"({place})")
        return replace(problem, where=f"stage {self.name}: {where}")

    def command(self, *, start: str | None, rewards: Mapping[str, str]) -> str:
        """Return the command that makes the same run without the pipeline."""
        words = ["llm-align", self.stage, self.recipe, *(["--from", start] if start else [])]
        shortcuts = self._shortcuts(None, rewards)
        return shlex.join([*words, *(f"{key}={_written(value)}" for key, value in shortcuts.items())])

    def _shortcuts(self, start: str | None, rewards: Mapping[str, str]) -> dict[str, Any]:
        sources = [_source(name, rewards[name], alone=len(rewards) == 1) for name in rewards]
        return {
            **({START: start} if start is not None else {}),
            **({REWARDS: sources} if sources else {}),
            **self.given,
        }

    def _origins(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Yield the settings that the pipeline's file or its command line has given, with their places."""
        for dotted, place in self.origins.items():
            key = ".".join(dotted.split(".")[:2])
            if recipe.origins.get(key) == COMMAND_LINE:
                yield key, place


def _source(name: str, run: str, *, alone: bool) -> dict[str, str]:
    """Return a reward as a recipe names it; one that is alone keeps the name that it has by itself."""
    return {"run": run} if alone else {"run": run, "name": name}


def _written(value: Any) -> str:
    """Return a value as a word of the command line, which reads it as YAML."""
    plain = isinstance(value, str) and yaml_file.scalar(value) == value
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
