"""Group relative policy optimization (GRPO): advantages are rewards normalized within a group of completions.

Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), equation 3: A_i = (r_i - mean r) / std r over a prompt's
completions, for every token of a completion, and beta times the KL to the reference (k3, equation 4) in the
loss. There is no value model. The reference is the initial policy. TRL's GRPOTrainer runs it; each step
samples its own completions, and an interrupted run resumes bit for bit.
"""

from typing import TYPE_CHECKING, ClassVar

from align.online.settings import GRPOSettings, OnlineSettings, online_rules
from finetune.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result


PUBLIC = "gsm8k"
"""Default recipe for a base other than the embedded one."""


class Settings(OnlineSettings):
    """Prompts, rewards, sampling, training, and the loss."""

    TRL_CONFIG: ClassVar[str] = "GRPOConfig"

    grpo: GRPOSettings = GRPOSettings()


RULES = online_rules("grpo")


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Train a policy with GRPO.

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
    if not run.finished:
        # Heavy libraries are imported only here: a finished run is returned without them.
        from align.online.stage import run_online_stage

        run_online_stage(recipe, run, settings.grpo, console=console, command=command)
    return Result.of(run)
