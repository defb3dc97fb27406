"""Preferences as a kind of rows: usable comparisons, mixed, and held out by prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np

from align.preference.rows.comparisons import Comparison, build_comparisons, count_contradictions, split_pair
from align.preference.rows.layouts import LABELED, PAIRS, RANKINGS, PreferenceRow
from align.preference.settings import PreferenceSettings
from data_templates.segments import Message
from finetune.data.layouts import Layout, match_layout
from finetune.data.load import Ids, SourceSpec, num_held_out, open_source
from finetune.data.mixture import MixtureComponent, draw_groups
from finetune.data.report import DataReport, SourceReport
from finetune.data.row_store import LocatedText, Rows, RowStore, message_values, text_digest
from finetune.recipe.errors import Problem, UserError

PreferenceKind = Literal["rankings", "labels"]
PREFERENCE_KINDS: dict[str, PreferenceKind] = {"dpo": "rankings", "reward": "rankings", "kto": "labels"}
"""Kind of preference data that each stage reads."""
PREFERENCE_LAYOUTS: dict[PreferenceKind, Sequence[Layout[PreferenceRow]]] = {
    "rankings": RANKINGS,
    "labels": (*LABELED, *PAIRS),
}
COLUMN_REPAIRS: dict[PreferenceKind, str] = {
    "rankings": "map the columns: 'data.columns={prompt: QUESTION, chosen: BETTER, rejected: WORSE}'",
    "labels": "map the columns: 'data.columns={prompt: QUESTION, completion: REPLY, label: GOOD}'",
}
INTENDED_FOR: dict[PreferenceKind, str] = {
    "rankings": "labels are for KTO",
    "labels": "ranked lists are for a reward model, DPO, RRHF or PRO",
}
"""The stages that use rows of the other kind."""


@dataclass(frozen=True)
class ComparisonRows:
    """Comparisons, or labeled completions.

    Attributes:
        settings: the recipe's data section.
        kind: ``rankings``: two or more completions of a prompt (reward models, DPO, RRHF, PRO); ``labels``:
            one completion that is good or bad (KTO).
        use_margin: whether the loss uses the column ``margin``; the report names it otherwise.
    """

    settings: PreferenceSettings
    kind: PreferenceKind = "rankings"
    use_margin: bool = False

    def load(
        self, spec: SourceSpec, index: int, seed: int, report: DataReport
    ) -> MixtureComponent[Comparison]:
        """Return a source's usable comparisons."""
        return load_comparisons(spec, index, seed, self, report)

    def split(self, rows: Rows[Comparison], held_out: int | float, seed: int) -> tuple[Ids, Ids]:
        """Return training and held-out rows by prompt."""
        return split_by_prompt(rows, held_out, seed)

    def groups(self, rows: Rows[Comparison]) -> Ids:
        """Return the prompt of each row, as a number."""
        return prompt_groups(rows)

    def count_relations(
        self,
        rows: Rows[Comparison],
        splits: tuple[Rows[Comparison], Rows[Comparison]],
        reports: tuple[DataReport, DataReport],
    ) -> None:
        """Count contradictions, and held-out prompts that are also in the training data."""
        train, held_out = splits
        count_contradictions(rows, reports[0])
        _count_shared_prompts(held_out, train, reports[1])


class HasPrompt(LocatedText, Protocol):
    """A row with a prompt."""

    @property
    def prompt(self) -> Sequence[Message]:
        """Return the prompt: equal prompts are held out together."""


PromptRow = TypeVar("PromptRow", bound=HasPrompt)


def split_by_prompt(rows: Rows[PromptRow], held_out: int | float, seed: int) -> tuple[Ids, Ids]:
    """Return the indices of the training and the held-out rows, so that no prompt is in both.

    Raises:
        UserError: no training rows would be left, or every prompt has more rows than are held out.
    """
    count = num_held_out(len(rows), held_out)
    rng = np.random.default_rng([seed, len(rows)])
    is_held_out = draw_groups(prompt_groups(rows), count, rng)
    if count and not is_held_out.any():
        actual = f"{count} of {len(rows)} usable rows, but every prompt has more"
        raise UserError(
            Problem("data.held_out", actual, "at least the rows of one prompt", "a larger number, or a file")
        )
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def prompt_groups(rows: Rows[PromptRow]) -> Ids:
    """Return the prompt of each row: equal prompts have equal numbers, in the order in which they occur."""
    numbers: dict[int, int] = {}
    return np.asarray(
        [numbers.setdefault(prompt_digest(row.prompt), len(numbers)) for row in rows], dtype=np.int64
    )


def prompt_digest(prompt: Sequence[Message]) -> int:
    """Return a digest of a prompt: equal prompts have equal digests."""
    return text_digest([message_values(turn) for turn in prompt])


def _count_shared_prompts(
    held_out: Rows[Comparison], train: Rows[Comparison], held_out_report: DataReport
) -> None:
    if not held_out:
        return
    train_rows = {prompt_digest(row.prompt): index for index, row in enumerate(train)}
    for row in held_out:
        same = train_rows.get(prompt_digest(row.prompt))
        if same is not None:
            held_out_report.count(
                "with a prompt that is in the training data",
                f"{row.location} has the prompt of {train[same].location}",
            )


def load_comparisons(
    spec: SourceSpec,
    index: int,
    seed: int,
    rows_kind: ComparisonRows,
    report: DataReport,
) -> MixtureComponent[Comparison]:
    """Return the usable comparisons of source number ``index``; ``report`` counts the others.

    Raises:
        UserError: the source cannot be read, its rows fit no layout, or none is usable.
    """

    def match(names: list[str]) -> Layout[PreferenceRow]:
        return _recognize_layout(names, spec, kind)

    settings, kind = rows_kind.settings, rows_kind.kind
    unused = () if rows_kind.use_margin else ("margin",)
    layout, parsed = open_source(spec, index, seed, match, report, unused=unused)
    num_read = 0

    def located_rows() -> Iterator[tuple[PreferenceRow, str]]:
        nonlocal num_read
        for preference_row, source_row, _ in parsed:
            num_read += 1
            yield preference_row, source_row.location

    usable = build_comparisons(located_rows(), settings, source=index, report=report)
    splits_pairs = kind == "labels" and layout in PAIRS
    if splits_pairs:
        # Split after ranking: ties and pairs with swapped scores are dropped by then.
        usable = (labeled for row in usable for labeled in split_pair(row))
    rows = RowStore(usable).rows()
    if not rows:
        actual = f"no usable comparison: {'; '.join(report.lines()[1:])}"
        repair = "check the rows named above, data.on_different_prompts and data.on_tie"
        raise UserError(Problem(spec.key, actual, "distinct completions", repair))
    if splits_pairs:
        report.notes.append(f"pairs of {spec.name} split into labels: chosen is good, rejected is bad")
    return MixtureComponent(
        SourceReport(spec.name, layout.name, num_read=num_read, num_usable=len(rows)), rows
    )


def _recognize_layout(names: list[str], spec: SourceSpec, kind: PreferenceKind) -> Layout[PreferenceRow]:
    """Return the layout of a source; the error names a layout of the other kind."""
    # With the targets of data.columns, which renames the file's columns.
    known = {*names, *(spec.columns or {})}
    other = LABELED if kind == "rankings" else RANKINGS
    fits = [layout.name for layout in other if known.issuperset(layout.required)]
    if fits and not any(known.issuperset(layout.required) for layout in PREFERENCE_LAYOUTS[kind]):
        actual = f"layout {fits[0]}: {INTENDED_FOR[kind]}"
        expected = "; ".join("+".join(layout.required) for layout in PREFERENCE_LAYOUTS[kind])
        raise UserError(Problem(spec.name, actual, expected, COLUMN_REPAIRS[kind]))
    return match_layout(
        names, PREFERENCE_LAYOUTS[kind], columns=spec.columns, where=spec.name, repair=COLUMN_REPAIRS[kind]
    )
