r"""Kahneman-Tversky optimization (KTO): completions labeled good or bad; no pairs, no reward model.

Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8: L = E[w_y - v(x, y)], v = w_D s(beta (r - z)) for good
completions and w_U s(beta (z - r)) for bad ones, r = log pi(y|x) / ref(y|x), z the mean of r over mismatched
prompts and completions. The reference model is the initial policy. TRL's KTOTrainer runs it.
"""

from typing import TYPE_CHECKING, ClassVar

from align.kto import settings as kto_settings
from align.kto.settings import KTODataSettings, KTOSettings, KTOTrainSettings
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

    data: KTODataSettings = KTODataSettings()
    train: KTOTrainSettings = KTOTrainSettings()
    kto: KTOSettings = KTOSettings()


RULES = kto_settings.RULES


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Train a policy on completions labeled good or bad.

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
    from align.kto.method import KTO, KTO_METRIC_SPEC, load_labeled_completions
    from finetune.training.context import RunContext
    from finetune.training.loading import load_policy, load_text_encoding
    from finetune.training.stage import run_stage

    ctx = RunContext(recipe, run, console, command, metric_spec=KTO_METRIC_SPEC)
    text = load_text_encoding(ctx)
    data = load_labeled_completions(ctx, settings.data, text)
    method = KTO(ctx, text, data, policy=load_policy(ctx), kto=settings.kto)
    run_stage(ctx, method)
    return Result.of(run)
