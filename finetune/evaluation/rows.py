"""Read the items of a suite: rows of a source, through a published benchmark's layout or our own columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_templates.segments import REPLY_ROLES, Message
from finetune.data.fields import RowError, text_field
from finetune.data.layouts import detect_layout, layout_values, parse_values
from finetune.data.readers import SourceRow
from finetune.data.rows import first_problems, row_problem
from finetune.data.sources import iter_source
from finetune.evaluation.items import EvalItem
from finetune.evaluation.suites import NamedSuite, Suite
from finetune.recipe.discovery import PROJECT, looks_local
from finetune.recipe.errors import Problem, UserError, did_you_mean

RowReader = Callable[[SourceRow], Sequence[EvalItem]]
"""Returns the items of a row, [] to leave it out; raises RowError for a row that does not fit."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_items(suite: NamedSuite) -> list[EvalItem]:
    """Return the items of a suite, each with an id, in the order of the rows.

    With a limit a random sample is drawn by the suite's seed, the same in every evaluation. It has as many
    clusters as possible: a second item of a cluster is drawn after a first of each.

    Raises:
        UserError: the source cannot be read, rows do not fit the layout, or none is left.
    """
    settings = suite.settings
    source = suite_source(suite)
    reader: RowReader | None = suite.layout.read_row if suite.layout else None
    items: list[EvalItem] = []
    problems: list[Problem] = []
    num_rows = 0
    for row in iter_source(source, split=settings.data.split, revision=settings.data.revision):
        num_rows += 1
        if not _is_selected(row.columns, settings.data.where):
            continue
        reader = reader or _default_reader(settings, list(row.columns), where=str(suite.path))
        try:
            renamed = _renamed(row, settings.data.columns or {})
            items += [_completed(item, renamed, settings, n) for n, item in enumerate(reader(renamed))]
        except RowError as error:
            problems.append(row_problem(error, row.location))
    if problems:
        raise UserError(first_problems(problems, num_rows))
    if not items:
        actual = f"none of {num_rows:,} rows of {source} is an item of this suite"
        raise UserError(Problem(str(suite.path), actual, "at least one", "check data.where and data.layout"))
    return _with_unique_ids(sample_items(items, settings.limit, seed=settings.seed))


def suite_source(suite: NamedSuite) -> str:
    """Return the source of a suite's rows; a path starts at the suite's folder, or at the project's."""
    source = suite.settings.data.source
    if Path(source).expanduser().is_absolute():
        return source
    for folder in (suite.path.resolve().parent, PROJECT):
        if (folder / source).exists():
            return str(folder / source)
    if looks_local(source):
        actual = f"no such file: {source} (looked in {suite.path.resolve().parent})"
        raise UserError(Problem(f"{suite.path}: data.source", actual, "an existing file or a Hub dataset"))
    return source


def _is_selected(columns: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(
        columns.get(name) in (wanted if isinstance(wanted, list) else [wanted])
        for name, wanted in where.items()
    )


def _renamed(row: SourceRow, columns: Mapping[str, str]) -> SourceRow:
    if missing := [theirs for theirs in columns.values() if theirs not in row.columns]:
        raise RowError("data.columns", f"no column '{missing[0]}'", f"one of {', '.join(row.columns)}")
    return SourceRow({**row.columns, **{o: row.columns[t] for o, t in columns.items()}}, row.location)


def _completed(item: EvalItem, row: SourceRow, settings: Suite, number: int) -> EvalItem:
    """Return an item with id, prompt and columns as the suite has them."""
    prompt = item.prompt
    if settings.prompt is not None:
        prompt = (Message("user", _filled(settings.prompt, row.columns)),)
    if settings.system_prompt is not None:
        prompt = (Message("system", settings.system_prompt), *prompt)
    name = Path(row.location).name
    item_id = item.id or (name if number == 0 else f"{name}.{number}")
    choices = item.choices
    if settings.style == "text" and prompt and not prompt[-1].content[-1:].isspace():
        # The space belongs to the choice: tokenizers join it to the word that follows.
        choices = tuple(choice if choice[:1].isspace() else f" {choice}" for choice in choices)
    return replace(item, id=item_id, prompt=prompt, choices=choices, columns=item.columns or row.columns)


def _filled(text: str, columns: Mapping[str, Any]) -> str:
    try:
        return text.format_map(columns)
    except KeyError as error:
        hint = did_you_mean(str(error.args[0]), columns)
        raise RowError("prompt", f"no column {error}", f"one of {', '.join(columns)}; {hint}") from error


def sample_items(items: Sequence[EvalItem], limit: int | None, *, seed: int) -> Sequence[EvalItem]:
    """Return at most ``limit`` random items in their order, of as many clusters as possible."""
    if limit is None or len(items) <= limit:
        return items
    # More items of one cluster would say less: they are not independent.
    ranks: dict[str, int] = {}
    order: list[tuple[int, int, int]] = []
    for index in np.random.default_rng(seed).permutation(len(items)).tolist():
        cluster = items[index].cluster or f"item {index}"
        ranks[cluster] = ranks.get(cluster, 0) + 1
        order.append((ranks[cluster], len(order), index))
    return [items[index] for index in sorted(index for *_, index in sorted(order)[:limit])]


def _with_unique_ids(items: Sequence[EvalItem]) -> list[EvalItem]:
    seen: dict[str, int] = {}
    unique = []
    for item in items:
        number = seen[item.id] = seen.get(item.id, 0) + 1
        unique.append(item if number == 1 else replace(item, id=f"{item.id}#{number}"))
    return unique


def _default_reader(settings: Suite, names: list[str], *, where: str) -> RowReader:
    """Return the reader of rows without a published layout."""
    if settings.task == "choice":
        return _read_choices
    if settings.task == "perplexity" and "text" in (*names, *(settings.data.columns or {})):
        return _read_text
    if settings.prompt is not None:
        return lambda row: [EvalItem("", reference=_optional_text(row.columns))]
    layout = detect_layout([*names, *(settings.data.columns or {})], columns=None, where=where)

    def read(row: SourceRow) -> list[EvalItem]:
        turns = parse_values(layout_values(row.columns, layout, {}), layout)
        reference = turns.pop().content if turns and turns[-1].role in REPLY_ROLES else None
        return [EvalItem("", tuple(turns), reference)]

    return read


def _optional_text(columns: Mapping[str, Any]) -> str | None:
    value = columns.get("expected")
    return None if value is None else str(value)


def _read_text(row: SourceRow) -> list[EvalItem]:
    return [EvalItem("", reference=text_field(row.columns, "text"))]


def _read_choices(row: SourceRow) -> list[EvalItem]:
    """Read ``question``, ``choices`` and ``answer``: an index, a letter, or the text of a choice."""
    choices = row.columns.get("choices")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(text, str) for text in choices)
    ):
        raise RowError("choices", f"found {choices!r:.60}", "a list of two or more texts")
    correct = choice_index(row.columns.get("answer"), choices)
    question = text_field(row.columns, "question")
    return [EvalItem("", (Message("user", question),), choices=tuple(choices), correct=(correct,))]


def choice_index(answer: Any, choices: Sequence[str]) -> int:
    """Return the index of an answer given as index, letter or text; raises RowError for another value."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        if answer in choices:
            return list(choices).index(answer)
        if len(answer) == 1 and answer.upper() in LETTERS[: len(choices)]:
            return LETTERS.index(answer.upper())
        if answer.isdigit() and int(answer) < len(choices):
            return int(answer)
    expected = f"an index from 0 to {len(choices) - 1}, a letter, or one of the choices"
    raise RowError("answer", f"found {answer!r:.60}", expected)
