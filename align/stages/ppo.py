r"""Proximal policy optimization (PPO): maximize a reward with a KL penalty to the reference policy.

Ouyang et al. 2022 (arXiv 2203.02155), equation 2: maximize E[r(x, y) - beta log(pi(y|x) / pi_SFT(y|x))] over
completions y sampled from the policy, with the clipped objective of Schulman et al. 2017 (arXiv 1707.06347,
equation 7). Policy, reference, reward and value share one frozen base in memory.
"""

from typing import TYPE_CHECKING

from align.ppo import stage_settings
from finetune.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result

PUBLIC = "hh"
"""Default recipe for a base other than the embedded one."""

Settings = stage_settings.Settings
RULES = stage_settings.RULES


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Train a policy with PPO.

    Args:
        recipe: the validated recipe.
        console: shows progress.
        force: start over if the run exists.
        command: command line, for the record.

    Raises:
        UserError: invalid input, before anything is written; or a reward function that fails on a completion.
        Interrupted: a signal arrived; a checkpoint is saved.
        NotFiniteError: loss, gradient or a reward is NaN or infinite.
    """
    from finetune.training.result import Result
    from finetune.training.run_directory import RunDirectory

    settings = recipe.settings
    assert isinstance(settings, Settings)
    run = RunDirectory.of(recipe, force=force)
    if run.finished:
        return Result.of(run)

    # Heavy libraries are imported only here: a finished run is returned without them.
    from align.ppo.loading import load_ppo_models
    from align.ppo.method import PPO
    from align.ppo.metric_spec import ppo_metric_spec
    from align.rl.prompts import load_prompts
    from finetune.training.context import RunContext
    from finetune.training.loading import load_text_encoding
    from finetune.training.stage import run_stage

    ctx = RunContext(recipe, run, console, command, metric_spec=ppo_metric_spec(settings))
    text = load_text_encoding(ctx)
    prompts = load_prompts(ctx, settings.data, text, max_new_tokens=settings.sampling.max_new_tokens)
    method = PPO(ctx, text, prompts, load_ppo_models(ctx, text))
    run_stage(ctx, method, finalize=method.diagnose)
    return Result.of(run)
