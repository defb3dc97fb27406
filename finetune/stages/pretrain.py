"""Continued pretraining: the model goes on reading text, yours, and every token carries loss.

The loss is the mean negative log-likelihood per token, L = -(1/N) sum_t log p(x_t | x_<t) (Gururangan et al.
2020, arXiv 2004.10964). Rows that are conversations are written with `data.template`: continued pretraining
on a task's text with its prompts (PCP: Shi & Lipani 2023, arXiv 2305.01711).
"""

from typing import TYPE_CHECKING

from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import DocumentSettings, StageSettings

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result


PUBLIC = "in-house"
"""The recipe that serves another base than the embedded one where none is named."""


class Settings(StageSettings):
    """As every stage; the data are documents."""

    data: DocumentSettings = DocumentSettings()


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Go on with pretraining on documents.

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
