"""Run stage rloo or grpo."""

from rich.console import Console

from align.online.loading import load_online_models
from align.online.method import OnlineRL
from align.online.metric_spec import online_metric_spec
from align.online.settings import GRPOSettings, OnlineSettings, RLOOSettings
from align.rl.prompts import load_prompts
from align.rl.rewards.settings import LENGTH_PENALTY
from finetune.recipe.recipe import Recipe
from finetune.training.context import RunContext
from finetune.training.loading import load_text_encoding
from finetune.training.run_directory import RunDirectory
from finetune.training.stage import run_stage


def run_online_stage(
    recipe: Recipe,
    run: RunDirectory,
    loss_settings: RLOOSettings | GRPOSettings,
    *,
    console: Console,
    command: str,
) -> None:
    """Train a policy with RLOO or GRPO on TRL's trainer.

    Args:
        recipe: the validated recipe.
        run: the run directory.
        loss_settings: the section of the stage, RLOO or GRPO.
        console: shows progress.
        command: command line, for the record.
    """
    settings = recipe.settings
    assert isinstance(settings, OnlineSettings)
    reward_names = [source.metric_name for source in settings.rewards.sources]
    reward_names += [LENGTH_PENALTY] if settings.rewards.length_penalty else []
    # Zero gradients are allowed: with equal rewards in every group of a step all advantages are 0.
    ctx = RunContext(
        recipe,
        run,
        console,
        command,
        metric_spec=online_metric_spec(reward_names),
        allows_zero_gradients=True,
    )
    text = load_text_encoding(ctx)
    prompts = load_prompts(ctx, settings.data, text, max_new_tokens=settings.sampling.max_new_tokens)
    run_stage(
        ctx, OnlineRL(ctx, text, prompts, load_online_models(ctx, text, settings.rewards), loss_settings)
    )
