"""REINFORCE leave-one-out (RLOO): a completion's baseline is the mean reward of the others of its prompt.

Ahmadian et al. 2024 (arXiv 2402.14740): of k completions y_i sampled from the policy, the gradient is
sum_i (R(y_i) - mean_{j != i} R(y_j)) grad log pi(y_i|x) / k; R = r(x, y) - beta log(pi(y|x) / ref(y|x)).
There is no value model. The reference is the initial policy. TRL's RLOOTrainer runs it; each step samples its
own completions, and an interrupted run resumes bit for bit.
"""

from typing import TYPE_CHECKING, ClassVar

from align.online.settings import OnlineSettings, RLOOSettings, online_rules
from finetune.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result


PUBLIC = "hh"
"""Default recipe for a base other than the embedded one."""


class Settings(OnlineSettings):
    """Prompts, rewards, sampling, training, and the loss."""

    TRL_CONFIG: ClassVar[str] = "RLOOConfig"

    rloo: RLOOSettings = RLOOSettings()


RULES = online_rules("rloo")


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Train a policy with RLOO.

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

        run_online_stage(recipe, run, settings.rloo, console=console, command=command)
    return Result.of(run)
