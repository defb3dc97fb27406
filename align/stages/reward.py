"""Reward model: trains a scalar score on human preferences (Bradley-Terry), on pairs or ranked lists.

The loss is the mean negative log-likelihood of the preferences (Ouyang et al. 2022, arXiv 2203.02155,
equation 1; Touvron et al. 2023, arXiv 2307.09288, equation 2): L = -(1/N) sum_n log s(r(x, y_w) - r(x, y_l) -
m), over all pairs of a ranked list at once.
"""

from typing import TYPE_CHECKING

from align.reward import settings
from finetune.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result

PUBLIC = "hh"
"""Default recipe for bases other than the embedded one."""

Settings = settings.Settings
RULES = settings.RULES


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Train a reward model on preference comparisons.

    Args:
        recipe: the loaded recipe.
        console: console for progress output.
        force: start over even if a run of this recipe exists.
        command: command line for run.json.

    Raises:
        UserError: invalid settings or data, before anything is written.
        Interrupted: stopped by a signal; a checkpoint is saved.
        NotFiniteError: loss, gradient or a score became NaN or infinite.
    """
    from align.reward.rules import save_rules
    from finetune.training.result import Result
    from finetune.training.run_directory import RunDirectory

    stage_settings = recipe.settings
    assert isinstance(stage_settings, Settings)
    run = RunDirectory.of(recipe, force=force)
    if run.finished:
        return Result.of(run)

    # Heavy libraries are imported only here: a finished run is returned without them.
    from align.preference.rows.load import load_preferences
    from align.reward.loading import load_reward_model_for_training
    from align.reward.method import RewardModeling
    from align.reward.metric_spec import reward_metric_spec
    from finetune.training.context import RunContext
    from finetune.training.loading import load_text_encoding

    ctx = RunContext(recipe, run, console, command, reward_metric_spec(stage_settings))
    text = load_text_encoding(ctx)
    data = load_preferences(ctx, stage_settings.data, text)
    method = RewardModeling(ctx, text, data, policy=load_reward_model_for_training(ctx, text.encoder))
    with ctx.recorded(**method.metadata()):
        save_rules(stage_settings, run)
        method.evaluate("before")
        trainer = method.build_trainer()
        ctx.fit(trainer)
        method.save(trainer)
        method.evaluate("after")
    return Result.of(run)
