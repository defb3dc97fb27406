"""REINFORCE leave-one-out: each reply to a prompt is compared with the mean of the others.

Ahmadian et al. 2024 (arXiv 2402.14740): of k replies y_i that the policy samples, the gradient is
sum_i (R(y_i) - mean_{j != i} R(y_j)) grad log pi(y_i|x) / k; R = r(x, y) - beta log(pi(y|x) / ref(y|x)).
There is no value model. The reference is the policy as it starts. TRL's RLOOTrainer runs it; each step draws
replies of its own, and a run that was stopped goes on to the bit.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

from align.online.settings import OnlineSettings, RlooSettings, contradictions
from finetune.recipe.errors import Problem
from finetune.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result


PUBLIC = "hh"
"""The recipe that serves another base than the embedded one where none is named."""


class Settings(OnlineSettings):
    """Prompts, rewards, how replies are drawn, and what is learnt from them."""

    TRL_CONFIG: ClassVar[str] = "RLOOConfig"

    align: RlooSettings = RlooSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return what contradicts itself, before anything is loaded."""
        return list(contradictions(self, self.align, valid))


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Tune a model on rewards of its own replies.

    Args:
        recipe: what to do.
        console: where progress is shown.
        force: start over where a run of this recipe is there already.
        command: the words that started it, for the record.

    Raises:
        UserError: the user's mistakes, before anything is written; or a reward that fails on a reply.
        Interrupted: a signal came; a checkpoint is there.
        NotFiniteError: loss, gradient or a reward became NaN or infinite.
    """
    from finetune.training.result import Result
    from finetune.training.run_directory import RunDirectory

    settings = recipe.settings
    assert isinstance(settings, Settings)
    run = RunDirectory.of(recipe, force=force)
    if not run.finished:
        from align.online.running import learn_online

        learn_online(recipe, run, settings.align, console=console, command=command)
    return Result.of(run)
