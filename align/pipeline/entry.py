"""One stage of a pipeline: its settings, and loading of its recipe."""

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
        name: name in the pipeline.
        stage: the stage that runs it (sft, dpo, ...).
        recipe: name or path of the recipe.
        init_from: name of the pipeline stage to initialize from; None starts from a base model.
        rewards: names of the pipeline stages that provide the reward models.
        overrides: overrides of the recipe's settings, by ``section.key``.
        origins: origin (file and line) of each override, also of ``model.start`` and ``reward.sources``.
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
        """Return ``stage/recipe``, or stage and path of a recipe file."""
        return f"{self.stage} {self.recipe}" if "/" in self.recipe else f"{self.stage}/{self.recipe}"

    @property
    def scores(self) -> bool:
        """Return whether its model is a reward model."""
        return self.stage in SCORERS

    @property
    def takes_rewards(self) -> bool:
        """Return whether the stage optimizes rewards."""
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
        """Load the recipe with the pipeline's overrides.

        Args:
            init_from: value of ``model.start``; None leaves the recipe's.
            rewards: the run of each name in ``rewards``.
            pending: recipes that have not run yet, by the names used in ``init_from`` and ``rewards``.

        Raises:
            UserError: all problems found, each prefixed with the stage's name.
        """
        shortcuts = self._shortcuts(start, rewards)
        try:
            with pending_scorers(pending or {}):
                recipe = load(self.stage, self.recipe, shortcuts=shortcuts, pending=pending)
        except UserError as error:
            raise UserError([self.placed(problem) for problem in error.problems]) from error
        return replace(recipe, origins={**recipe.origins, **dict(self._origins(recipe))})

    def placed(self, problem: Problem) -> Problem:
        """Prefix a problem with the stage's name, and replace its origin by the pipeline's line."""
        where = problem.where
        if where.startswith(f"stage {self.name}: "):
            return problem
        key = where.removesuffix(f" ({COMMAND_LINE})").strip("'")
        if key != where.strip("'"):
            place = next((self.origins[own] for own in self.origins if key.startswith(own)), COMMAND_LINE)
            where = where.replace(f"({COMMAND_LINE})", f"({place})")
        return replace(problem, where=f"stage {self.name}: {where}")

    def command(self, *, start: str | None, rewards: Mapping[str, str]) -> str:
        """Return the command line of the same run outside the pipeline."""
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
        """Yield the settings overridden by the pipeline file or the command line, with their origins."""
        for dotted, place in self.origins.items():
            key = ".".join(dotted.split(".")[:2])
            if recipe.origins.get(key) == COMMAND_LINE:
                yield key, place


def _source(name: str, run: str, *, alone: bool) -> dict[str, str]:
    """Return an entry of `reward.sources`; a single reward keeps its default name."""
    return {"run": run} if alone else {"run": run, "name": name}


def _written(value: Any) -> str:
    """Return a value as a command-line argument, which is parsed as YAML."""
    plain = isinstance(value, str) and yaml_file.scalar(value) == value
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
