"""Supervised fine-tuning (SFT) on prompts and assistant replies.

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
"""Default recipe if a base other than the embedded one is given without a recipe."""


class Settings(StageSettings):
    """Settings of every stage: model, data, adapter, training and evaluation."""


def run(recipe: Recipe, console: "Console", *, force: bool = False, command: str = "") -> "Result":
    """Fine-tune a model on instructions and replies.

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
