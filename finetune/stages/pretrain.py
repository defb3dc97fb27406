"""Continued pretraining: causal language modeling on your own text, with a loss on every token.

The loss is the mean negative log-likelihood per token, L = -(1/N) sum_t log p(x_t | x_<t) (Gururangan et al.
2020, arXiv 2004.10964). Conversations are rendered with `data.template`: continued pretraining on a task's
text with its prompts (PCP: Shi & Lipani 2023, arXiv 2305.01711).
"""

from typing import TYPE_CHECKING

from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import DocumentSettings, StageSettings

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.training.result import Result


PUBLIC = "in-house"
"""Default recipe if a base other than the embedded one is given without a recipe."""


class Settings(StageSettings):
    """Settings of every stage; the data are documents."""

    data: DocumentSettings = DocumentSettings()


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Continue pretraining on documents.

    Args:
        recipe: the recipe.
        console: receives progress output.
        force: replace an existing run of this recipe.
        command: the command line, for run.json.

    Raises:
        UserError: the recipe or the data are invalid; nothing was written.
        Interrupted: a signal came; a checkpoint was saved.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    from finetune.training.result import Result
    from finetune.training.run_directory import RunDirectory

    run = RunDirectory.of(recipe, force=force)
    if not run.finished:
        from finetune.training.context import RunContext
        from finetune.training.stage import run_supervised

        run_supervised(RunContext(recipe, run, console, command))
    return Result.of(run)
