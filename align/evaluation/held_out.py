"""Suites of a run's own held-out rows: the task that it was trained for, with the recipe's graders."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from align.data_check import row_kind
from align.preference.rows.comparisons import Comparison
from align.rl.prompt_rows import RawPrompt
from data_templates.segments import Message
from finetune.data.conversation import Conversation
from finetune.data.load import load_rows
from finetune.data.report import DataReport
from finetune.data.row_columns import RowColumns
from finetune.evaluation.items import EvalItem
from finetune.evaluation.suites import NamedSuite, Suite, SuiteData, Task
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.recipe.runs import read_run_record
from finetune.training.samples import evenly_spaced

PREFIX = "held-out"
MAX_ITEMS = 500
"""Held-out rows that are used: generation of more takes long, and a limit raises it."""


@dataclass(frozen=True)
class SuiteItems:
    """A suite and its items."""

    suite: NamedSuite
    items: Sequence[EvalItem]


@dataclass(frozen=True)
class RunRows:
    """Rows of a run: items of its held-out split, and the texts of its training prompts."""

    items: Sequence[EvalItem]
    trained_prompts: frozenset[str]


def load_run_recipe(run: Path) -> Recipe:
    """Return the resolved recipe of a run."""
    return read_recipe(read_run_record(run)["stage"], str(run / "recipe.yaml"))


def read_run_rows(recipe: Recipe) -> RunRows:
    """Return the rows of a run, split as in its training.

    Raises:
        UserError: the rows cannot be read any more.
    """
    settings = recipe.settings
    kind = row_kind(recipe.stage, settings.data)
    train, held_out = load_rows(kind, settings.data, settings.train.seed, DataReport(), DataReport())
    items = [_item(held_out[index]) for index in evenly_spaced(len(held_out), MAX_ITEMS)]
    columns = RowColumns(settings.data, [[item.id for item in items]])
    with_columns = [replace(item, columns=columns.get(item.id, {})) for item in items]
    return RunRows(with_columns, frozenset(prompt_key(_item(row).prompt) for row in train))


def prompt_key(prompt: Iterable[Message]) -> str:
    """Return the text by which equal prompts are found: the turns without the system prompt."""
    texts = (f"{turn.content}\n{turn.context}" for turn in prompt if turn.role != "system")
    return " ".join("\n".join(texts).split()).casefold()


def held_out_suites(run: Path, recipe: Recipe, rows: RunRows) -> list[SuiteItems]:
    """Return the suites of a run's held-out rows.

    Each of the recipe's graders and exact match is one; so is the log-probability of the rows' replies, or of
    preferences the choice between the chosen and the rejected completion.
    """
    evaluate = recipe.settings.evaluate
    with_reference = [item for item in rows.items if item.reference]
    prompts = [item for item in rows.items if item.prompt]
    suites = []
    if any(item.choices for item in rows.items):
        chosen = [item for item in rows.items if item.choices]
        suites.append(_suite(run, recipe, "preference", "choice", chosen))
    elif with_reference:
        suites.append(_suite(run, recipe, "likelihood", "perplexity", with_reference))
    if evaluate.exact_match and (graded := [item for item in prompts if item.reference]):
        suites.append(_suite(run, recipe, "exact-match", "completion", graded, grader="exact"))
    for name, grader in evaluate.graders.items():
        # A function that was given in Python is not there any more.
        if isinstance(grader, str) and prompts:
            suites.append(_suite(run, recipe, name, "completion", prompts, grader=grader))
    return suites


def _suite(
    run: Path, recipe: Recipe, name: str, task: Task, items: Sequence[EvalItem], *, grader: str | None = None
) -> SuiteItems:
    settings = Suite(
        description=f"held-out rows of {run.name}: {name.replace('-', ' ')}",
        task=task,
        data=SuiteData(source=str(run)),
        grader=grader,
        max_new_tokens=recipe.settings.max_reply_tokens,
    )
    return SuiteItems(NamedSuite(f"{PREFIX}-{name}", run / "recipe.yaml", settings), items)


def _item(row: Conversation | Comparison | RawPrompt) -> EvalItem:
    """Return a row of any stage as an item: prompt, and its own reply or its compared completions."""
    if isinstance(row, Comparison):
        if len(row.replies) < 2:
            return EvalItem(row.location, tuple(row.prompt))
        texts = tuple(reply.content for reply in (row.replies[0], row.replies[-1]))
        distinct = texts if texts[0] != texts[1] and row.ranks[0] != row.ranks[-1] else ()
        return EvalItem(row.location, tuple(row.prompt), choices=distinct, correct=(0,) if distinct else ())
    if isinstance(row, Conversation):
        if row.is_document:
            return EvalItem(row.location, reference=row.messages[-1].content)
        return EvalItem(row.location, tuple(row.messages[:-1]), row.messages[-1].content or None)
    return EvalItem(row.location, tuple(row.prompt), row.expected)
