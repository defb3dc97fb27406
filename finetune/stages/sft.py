"""Supervised fine-tuning: the model learns to write the replies, given the prompts.

The loss is the mean negative log-likelihood per reply token (Ouyang et al. 2022, arXiv 2203.02155, section
3.5; Wei et al. 2021, arXiv 2109.01652): L = -(1/N) sum_t m_t log p(x_t | x_<t), m_t = 1 where token t is
the assistant's.
"""

from typing import TYPE_CHECKING

from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result


PUBLIC = "alpaca"
"""The recipe that serves another base than the embedded one where none is named."""


class Settings(StageSettings):
    """Model, data, adapter, training and evaluation: nothing beyond what every stage has."""


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Tune a model on instructions and replies.

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

    run = RunDirectory.of(recipe, force=force)
    if not run.finished:
        from finetune.training.job import Job
        from finetune.training.tune import tune

        tune(Job(recipe, run, console, command))
    return Result.of(run)
