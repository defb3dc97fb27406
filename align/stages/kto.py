r"""Kahneman-Tversky optimization (KTO): completions labeled good or bad; no pairs, no reward model.

Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8: L = E[w_y - v(x, y)], v = w_D s(beta (r - z)) for good
completions and w_U s(beta (z - r)) for bad ones, r = log pi(y|x) / ref(y|x), z the mean of r over mismatched
prompts and completions. The reference model is the initial policy. TRL's KTOTrainer runs it.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

from align.dpo.checks import copied_by_trl
from align.kto import settings as kto_settings
from align.kto.settings import KtoDataSettings, KtoSettings, KtoTrainSettings
from finetune.recipe.errors import Problem
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result


PUBLIC = "kto-mix"
"""The default recipe for a base model other than the embedded one."""


class Settings(StageSettings):
    """Recipe of stage kto: labeled completions and the KTO loss."""

    TRL_CONFIG: ClassVar[str] = "KTOConfig"

    data: KtoDataSettings = KtoDataSettings()
    train: KtoTrainSettings = KtoTrainSettings()
    align: KtoSettings = KtoSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return the cross-field problems, before anything is loaded."""
        found: list[Problem] = []
        if "train" in valid:
            found += kto_settings.of_training(self.train)
        if "adapter" in valid:
            found += copied_by_trl(self)
        return found


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Train a policy on completions labeled good or bad.

    Args:
        recipe: the validated recipe.
        console: where progress is shown.
        force: start over if the recipe has been run before.
        command: the command line, for run.json.

    Raises:
        UserError: the user's mistakes, before anything is written.
        Interrupted: stopped by a signal; a checkpoint is saved.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    from finetune.training.result import Result
    from finetune.training.run_directory import RunDirectory

    settings = recipe.settings
    assert isinstance(settings, Settings)
    run = RunDirectory.of(recipe, force=force)
    if run.finished:
        return Result.of(run)

    from align.kto.tuning import WATCHED, KtoTuning, load_labels
    from finetune.training.job import Job
    from finetune.training.loading import load_policy, load_text
    from finetune.training.tune import carry_out

    job = Job(recipe, run, console, command, watched=WATCHED)
    text = load_text(job)
    data = load_labels(job, settings.data, text)
    tuning = KtoTuning(job, text, data, policy=load_policy(job), align=settings.align)
    carry_out(job, tuning)
    return Result.of(run)
