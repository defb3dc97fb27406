r"""Direct preference optimization: the preferred completion becomes the likelier one; no reward model.

Rafailov et al. 2023 (arXiv 2305.18290), equation 7: L = -E log s(beta [log pi(y_w|x) / ref(y_w|x) - log
pi(y_l|x) / ref(y_l|x)]), y_w preferred to y_l, and the reference is the policy as it starts. Its variants on
pairs and on ranked lists, with and without a reference, are chosen with ``align.loss``.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

from align.dpo.checks import contradictions
from align.dpo.settings import AlignSettings
from align.preference.settings import PreferenceSettings
from finetune.recipe.errors import Problem
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result


PUBLIC = "ultrafeedback"
"""The recipe that serves another base than the embedded one where none is named."""


class Settings(StageSettings):
    """Preference data, and what is learnt from it."""

    TRL_CONFIG: ClassVar[str] = "DPOConfig"

    data: PreferenceSettings = PreferenceSettings()
    align: AlignSettings = AlignSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return what contradicts itself, before anything is loaded."""
        return list(contradictions(self, self.align, valid))


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Tune a model on preferences.

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

    from align.dpo.tuning import PreferenceTuning
    from align.dpo.watched import WATCHED
    from align.preference.rows.load import load_preferences
    from finetune.training.job import Job
    from finetune.training.loading import load_policy, load_text
    from finetune.training.tune import carry_out

    job = Job(recipe, run, console, command, watched=WATCHED)
    text = load_text(job)
    data = load_preferences(job, settings.data, text)
    tuning = PreferenceTuning(job, text, data, policy=load_policy(job), align=settings.align)
    carry_out(job, tuning, conclude=tuning.explain)
    return Result.of(run)
