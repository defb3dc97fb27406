r"""Direct preference optimization (DPO): raise the chosen completion over the rejected one, no reward model.

Rafailov et al. 2023 (arXiv 2305.18290), equation 7: L = -E log s(beta [log pi(y_w|x) / ref(y_w|x) - log
pi(y_l|x) / ref(y_l|x)]), y_w preferred to y_l; the reference model is the initial policy. ``dpo.loss``
selects the variants on pairs and ranked lists, with and without a reference.
"""

from typing import TYPE_CHECKING, ClassVar

from align.dpo import settings as dpo_settings
from align.dpo.settings import DPOSettings
from align.preference.settings import PreferenceSettings
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result


PUBLIC = "ultrafeedback"
"""The default recipe for a base model other than the embedded one."""


class Settings(StageSettings):
    """Recipe of stage dpo: preference data and the loss."""

    TRL_CONFIG: ClassVar[str] = "DPOConfig"

    data: PreferenceSettings = PreferenceSettings()
    dpo: DPOSettings = DPOSettings()


RULES = dpo_settings.RULES


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Train a policy on preferences.

    Args:
        recipe: the validated recipe.
        console: shows progress.
        force: start over if the run exists.
        command: the command line, for run.json.

    Raises:
        UserError: invalid settings or data, before anything is written.
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

    # Heavy libraries are imported only here: a finished run is returned without them.
    from align.dpo.method import DPO
    from align.dpo.metric_spec import DPO_METRIC_SPEC
    from align.preference.rows.load import load_preferences
    from finetune.training.context import RunContext
    from finetune.training.loading import load_policy, load_text_encoding
    from finetune.training.stage import run_stage

    ctx = RunContext(recipe, run, console, command, metric_spec=DPO_METRIC_SPEC)
    text = load_text_encoding(ctx)
    data = load_preferences(ctx, settings.data, text)
    method = DPO(ctx, text, data, policy=load_policy(ctx), dpo=settings.dpo)
    run_stage(ctx, method, finalize=method.diagnose)
    return Result.of(run)
