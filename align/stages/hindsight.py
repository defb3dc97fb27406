"""Chain of hindsight: preferences become text, each completion announced by what was thought of it.

Liu et al. 2023 (arXiv 2302.02676), section 3: with the loss of supervised tuning the model learns to write
bad and good completions behind the words that ask for either; afterwards it is asked for good ones.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

from align.preference.settings import HindsightSettings, PreferenceSettings
from finetune.recipe.errors import Problem
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result

PUBLIC = "hh"
"""The recipe that serves another base than the embedded one where none is named."""


class Settings(StageSettings):
    """Preference data, and the words of its feedback."""

    data: PreferenceSettings = PreferenceSettings()
    hindsight: HindsightSettings = HindsightSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return what contradicts itself, before anything is loaded."""
        return self.hindsight.problems() if "hindsight" in valid else []


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Tune a model on chains of completions.

    Args:
        recipe: what to do.
        console: where progress is shown.
        force: start over where a run of this recipe is there already.
        command: the words that started it, for the record.

    Raises:
        UserError: the user's mistakes, before anything is written.
        Interrupted: a signal came; a checkpoint is there.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    from finetune.training.result import Result
    from finetune.training.run_directory import RunDirectory

    settings = recipe.settings
    assert isinstance(settings, Settings)
    run = RunDirectory.of(recipe, force=force)
    if run.finished:
        return Result.of(run)

    from align.preference.hindsight import load_chains, wishing_text
    from finetune.training.job import Job
    from finetune.training.loading import load_policy, load_text
    from finetune.training.supervised import Supervised
    from finetune.training.tune import carry_out

    job = Job(recipe, run, console, command)
    text = wishing_text(load_text(job), settings.hindsight.good)
    data = load_chains(job, settings.data, settings.hindsight, text)
    carry_out(job, Supervised(job, text, data, policy=load_policy(job)))
    return Result.of(run)
