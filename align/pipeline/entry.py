"""One stage of a pipeline: its settings, and loading of its recipe."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from align.pipeline.settings import REWARDS_KEY
from align.rl.rewards.run_info import pending_reward_recipes
from finetune.recipe import yaml_file
from finetune.recipe.command_line import COMMAND_LINE
from finetune.recipe.discovery import verb_of
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.parent_run import SCORING_STAGES
from finetune.recipe.recipe import Recipe, read_recipe, stage_settings

INIT_FROM_KEY, BASE_KEY = "model.init_from", "model.base"


@dataclass(frozen=True)
class StageEntry:
    """One stage of a pipeline.

    Attributes:
        name: name in the pipeline.
        stage: the stage that runs it (sft, dpo, ...).
        recipe: name or path of the recipe.
        init_from: name of the pipeline stage to initialize from; None starts from a base model.
        rewards: names of the pipeline stages that provide the reward models.
        overrides: overrides of the recipe's settings, by ``section.key``.
        origins: origin (file and line) of each override, also of ``model.init_from`` and ``rewards.sources``.
    """

    name: str
    stage: str
    recipe: str
    init_from: str | None = None
    rewards: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return ``stage/recipe``, or stage and path of a recipe file."""
        return f"{self.stage} {self.recipe}" if "/" in self.recipe else f"{self.stage}/{self.recipe}"

    @property
    def is_reward_model(self) -> bool:
        """Return whether its model is a reward model."""
        return self.stage in SCORING_STAGES

    @property
    def takes_rewards(self) -> bool:
        """Return whether the stage optimizes rewards."""
        section, key = REWARDS_KEY.split(".")
        sections = stage_settings(self.stage).model_fields
        return section in sections and key in sections[section].annotation.model_fields  # type: ignore[union-attr]

    def load(
        self,
        *,
        init_from: str | None,
        rewards: Mapping[str, str],
        pending: Mapping[str, Recipe] | None = None,
    ) -> Recipe:
        """Load the recipe with the pipeline's overrides.

        Args:
            init_from: value of ``model.init_from``; None leaves the recipe's.
            rewards: the run of each name in ``rewards``.
            pending: recipes that have not run yet, by the names used in ``init_from`` and ``rewards``.

        Raises:
            UserError: all problems found, each prefixed with the stage's name.
        """
        shortcuts = self._shortcuts(init_from, rewards)
        try:
            with pending_reward_recipes(pending or {}):
                recipe = read_recipe(self.stage, self.recipe, shortcuts=shortcuts, pending=pending)
        except UserError as error:
            raise UserError([self.with_stage_name(problem) for problem in error.problems]) from error
        return replace(recipe, origins={**recipe.origins, **dict(self._origins(recipe))})

    def with_stage_name(self, problem: Problem) -> Problem:
        """Prefix a problem with the stage's name, and replace its origin by the pipeline's line."""
        where = problem.where
        # An error may pass here twice: when the recipe is loaded, and when the stage fails.
        if where.startswith(f"stage {self.name}: "):
            return problem
        key = where.removesuffix(f" ({COMMAND_LINE})").strip("'")
        if key != where.strip("'"):
            origin = next(
                (self.origins[setting] for setting in self.origins if key.startswith(setting)), COMMAND_LINE
            )
            where = where.replace(f"({COMMAND_LINE})", f"({origin})")
        return replace(problem, where=f"stage {self.name}: {where}")

    def command(self, *, init_from: str | None, rewards: Mapping[str, str]) -> str:
        """Return the command line of the same run outside the pipeline."""
        arguments = [
            "llm-align",
            verb_of(self.stage),
            self.recipe,
            *(["--from", init_from] if init_from else []),
        ]
        shortcuts = self._shortcuts(None, rewards)
        return shlex.join([*arguments, *(f"{key}={_cli_value(value)}" for key, value in shortcuts.items())])

    def _shortcuts(self, init_from: str | None, rewards: Mapping[str, str]) -> dict[str, Any]:
        sources = [_reward_source(name, rewards[name], is_only_reward=len(rewards) == 1) for name in rewards]
        return {
            **({INIT_FROM_KEY: init_from} if init_from is not None else {}),
            **({REWARDS_KEY: sources} if sources else {}),
            **self.overrides,
        }

    def _origins(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Yield the settings overridden by the pipeline file or the command line, with their origins."""
        for dotted, origin in self.origins.items():
            key = ".".join(dotted.split(".")[:2])
            # The recipe got the overrides as if from the command line, which is their origin there.
            if recipe.origins.get(key) == COMMAND_LINE:
                yield key, origin


def _reward_source(name: str, run: str, *, is_only_reward: bool) -> dict[str, str]:
    """Return an entry of `rewards.sources`; a single reward keeps its default name."""
    return {"run": run} if is_only_reward else {"run": run, "name": name}


def _cli_value(value: Any) -> str:
    """Return a value as a command-line argument, which is parsed as YAML."""
    needs_no_quotes = isinstance(value, str) and yaml_file.parse_scalar(value) == value
    return str(value) if needs_no_quotes else json.dumps(value, ensure_ascii=False)
