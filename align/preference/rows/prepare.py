"""Preference data pipeline: read, filter, split, tokenize and report a recipe's data section."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np

from align.preference.rows.comparisons import Comparison, build_comparisons, count_contradictions, split_pair
from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences
from align.preference.rows.encode import LengthLimits, tokenize_comparisons
from align.preference.rows.layouts import LABELED, PAIRS, RANKINGS, PreferenceRow
from align.preference.settings import PreferenceSettings, prompt_length_problems
from finetune.data.conversation import Conversation
from finetune.data.layouts import Layout, match_layout, parse_rows
from finetune.data.load import (
    SourceSpec,
    count_duplicates,
    count_leaked,
    num_held_out,
    read_rows_of,
    source_specs,
)
from finetune.data.mixture import MixtureComponent, mix_components
from finetune.data.report import DataReport, SourceReport
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.training.context import RunContext
from finetune.training.model import TextEncoding

PreferenceKind = Literal["rankings", "labels"]
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

NUM_TRAINING_PROMPTS = 64
"""Training prompts for samples if nothing is held out."""


def load_preferences(
    ctx: RunContext,
    settings: PreferenceSettings,
    text: TextEncoding,
    *,
    kind: PreferenceKind = "rankings",
) -> PreparedPreferences:
    """Read and tokenize a recipe's preference data, and log the data report.

    Args:
        ctx: the run.
        settings: its data section.
        text: template and tokenizer.
        kind: comparisons, or labeled completions.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    seed = ctx.settings.train.seed
    with ctx.timed("data"):
        data = prepare_preferences(settings, text.encoder, max_length=text.max_length, seed=seed, kind=kind)
    for line in data.report.lines():
        ctx.log(line)
    return data


def prepare_preferences(
    settings: PreferenceSettings,
    encoder: Encoder,
    *,
    max_length: int,
    seed: int,
    kind: PreferenceKind = "rankings",
) -> PreparedPreferences:
    """Read, split and tokenize the preference data of a data section.

    Args:
        settings: the recipe's data section.
        encoder: template and tokenizer.
        max_length: maximum tokens of a prompt with one completion.
        seed: samples the held-out rows and a mixture's rows.
        kind: ``rankings``: two or more completions of a prompt (reward models, DPO, RRHF, PRO); ``labels``:
            one completion that is good or bad (KTO).

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or no row is usable.
    """
    limits = _length_limits(settings, max_length)
    report, held_out_report = DataReport(), DataReport()
    train, held_out = load_comparisons(settings, seed, report, held_out_report, kind=kind)
    train_groups = tokenize_comparisons(train, encoder, limits, cache=settings.cache, report=report)
    _raise_if_no_groups("data.source", "to train on", train_groups, report)
    held_out_groups = None
    if settings.held_out:
        held_out_groups = tokenize_comparisons(
            held_out, encoder, limits, cache=settings.cache, report=held_out_report
        )
        _raise_if_no_groups("data.held_out", "to evaluate on", held_out_groups, held_out_report)
        report.held_out = len(held_out_groups)
    report.counts |= {f"held out: {what}": count for what, count in held_out_report.counts.items()}
    report.examples |= {f"held out: {what}": location for what, location in held_out_report.examples.items()}
    _fill_preference_report(train_groups, report)
    prompts = (
        _tokenized_conversations(train, train_groups)[:NUM_TRAINING_PROMPTS]
        if held_out_groups is None
        else _tokenized_conversations(held_out, held_out_groups)
    )
    return PreparedPreferences(train_groups, held_out_groups, prompts, report)


def _length_limits(settings: PreferenceSettings, max_length: int) -> LengthLimits:
    max_prompt_length = settings.max_prompt_length or max_length // 2
    # Where `max_length` is auto; a rule of recipes compares a given one.
    if problems := [*prompt_length_problems(max_prompt_length, max_length)]:
        raise UserError(problems)
    return LengthLimits(max_length, max_prompt_length, settings.overflow == "drop")


def load_comparisons(
    settings: PreferenceSettings,
    seed: int,
    report: DataReport,
    held_out_report: DataReport,
    *,
    kind: PreferenceKind = "rankings",
) -> tuple[list[Comparison], list[Comparison]]:
    """Return the training and the held-out comparisons, as text.

    Args:
        settings: the recipe's data section.
        seed: samples the held-out rows and a mixture's rows.
        report: counts dropped rows, and the rows of each source.
        held_out_report: counts dropped rows of a held-out file.
        kind: as for ``prepare_preferences``.

    Raises:
        UserError: a source cannot be read, or rows do not fit its layout.
    """
    sources = enumerate(source_specs(settings))
    components = [
        _load_comparison_source(spec, index, seed, settings, kind, report) for index, spec in sources
    ]
    report.sources = [component.report for component in components]
    report.layout = " + ".join(dict.fromkeys(source_report.layout for source_report in report.sources))
    if settings.mix is None:
        train, held_out = split_by_prompt(components[0].rows, settings.held_out, seed)
    else:
        train, held_out = mix_components(components, settings, seed=seed, report=report)
    if isinstance(settings.held_out, str):
        spec = SourceSpec("data.held_out", settings.held_out, settings.split, None, settings.columns)
        held_out = _load_comparison_source(spec, 0, seed, settings, kind, held_out_report).rows
    all_rows = [row for component in components for row in component.rows]
    count_duplicates(all_rows, report)
    count_contradictions(all_rows, report)
    count_leaked(held_out, train, held_out_report)
    _count_shared_prompts(held_out, train, held_out_report)
    return train, held_out


class HasPrompt(Protocol):
    """A row with a prompt."""

    @property
    def prompt(self) -> object:
        """Return the prompt, hashable: equal prompts are held out together."""


PromptRow = TypeVar("PromptRow", bound=HasPrompt)


def split_by_prompt(
    rows: list[PromptRow], held_out: int | float | str, seed: int
) -> tuple[list[PromptRow], list[PromptRow]]:
    """Split rows into training and held-out ones by prompt, so that no prompt is in both.

    Raises:
        UserError: no training rows would be left, or every prompt has more rows than are held out.
    """
    if isinstance(held_out, str):
        return rows, []
    count = num_held_out(len(rows), held_out)
    rows_by_prompt: dict[object, list[int]] = {}
    for row_index, row in enumerate(rows):
        rows_by_prompt.setdefault(row.prompt, []).append(row_index)
    prompt_rows = list(rows_by_prompt.values())
    held_out_rows: set[int] = set()
    # Greedy: a prompt with more rows than are still wanted is skipped.
    for index in np.random.default_rng([seed, len(rows)]).permutation(len(prompt_rows)):
        if len(held_out_rows) + len(prompt_rows[index]) <= count:
            held_out_rows.update(prompt_rows[index])
    if count and not held_out_rows:
        actual = f"{count} of {len(rows)} usable rows, but every prompt has more"
        raise UserError(
            Problem("data.held_out", actual, "at least the rows of one prompt", "a larger number, or a file")
        )
    return [row for i, row in enumerate(rows) if i not in held_out_rows], [
        rows[i] for i in sorted(held_out_rows)
    ]


def _count_shared_prompts(
    held_out: Sequence[Comparison], train: Sequence[Comparison], held_out_report: DataReport
) -> None:
    train_prompts = {row.prompt: row.location for row in train}
    for row in held_out:
        if row.prompt in train_prompts:
            held_out_report.count(
                "with a prompt that is in the training data",
                f"{row.location} has the prompt of {train_prompts[row.prompt]}",
            )


def _load_comparison_source(
    spec: SourceSpec,
    index: int,
    seed: int,
    settings: PreferenceSettings,
    kind: PreferenceKind,
    report: DataReport,
) -> MixtureComponent[Comparison]:
    rows = read_rows_of(spec, index, seed)
    layout = _recognize_layout(list(rows[0].columns), spec, kind)
    preference_rows = parse_rows(rows, layout, spec.columns)
    located_rows = [
        (preference_row, source_row.location)
        for preference_row, source_row in zip(preference_rows, rows, strict=True)
    ]
    usable = build_comparisons(located_rows, settings, source=index, report=report)
    if not usable:
        actual = f"no usable comparison: {'; '.join(report.lines()[1:])}"
        repair = "check the rows named above, data.on_different_prompts and data.on_tie"
        raise UserError(Problem(spec.key, actual, "distinct completions", repair))
    if kind == "labels" and layout in PAIRS:
        # Split after ranking: ties and pairs with swapped scores are dropped by then.
        report.notes.append(f"pairs of {spec.name} split into labels: chosen is good, rejected is bad")
        usable = [labeled for source_row in usable for labeled in split_pair(source_row)]
    return MixtureComponent(
        SourceReport(spec.name, layout.name, num_read=len(rows), num_usable=len(usable)), usable
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


def _raise_if_no_groups(key: str, purpose: str, groups: PreferenceGroups, report: DataReport) -> None:
    if not len(groups):
        actual = f"no rows {purpose}: {'; '.join(report.lines()[1:])}"
        remedy = "raise data.max_length" if report.num_too_long else "choose another data.template"
        repair = f"check the rows named above, or {remedy}"
        raise UserError(Problem(key, actual, "distinct completions", repair))


def _tokenized_conversations(rows: Sequence[Comparison], groups: PreferenceGroups) -> list[Conversation]:
    """Return the conversations of tokenized rows, one per row, ending with the best completion."""
    locations = set(groups.locations)
    tokenized = {row.location: row for row in rows if row.location in locations}.values()
    return [Conversation([*row.prompt, row.replies[0]], row.location, row.source) for row in tokenized]


def _fill_preference_report(groups: PreferenceGroups, report: DataReport) -> None:
    """Fill the report: rows and tokens, in all and per source, mean lengths of prompts and completions."""
    lengths = groups.completion_lengths
    group_of_completion = np.repeat(np.arange(len(groups)), groups.num_completions)
    report.rows, report.tokens, report.longest = len(groups), groups.num_tokens, groups.longest
    report.trained_tokens = int(lengths.sum())
    for source_index, source in enumerate(report.sources):
        in_source = np.asarray(groups.source_ids) == source_index
        source.rows, source.tokens = int(in_source.sum()), int(groups.lengths[in_source].sum())
        source.trained_tokens = int(lengths[in_source[group_of_completion]].sum())
    best = groups.ranks == 0
    summary = f"{len(lengths)} completions; mean tokens: prompt {groups.prompt_lengths.mean():.0f}"
    # Each completion is the best of its group: labels, one completion per group.
    if best.all():
        num_good = int((groups.scores == 1).sum())
        report.notes.append(
            f"{summary}, completion {lengths.mean():.0f}; {num_good} good, {len(lengths) - num_good} bad"
        )
    else:
        better, worse = lengths[best].mean(), lengths[~best].mean()
        report.notes.append(f"{summary}, best completion {better:.0f}, others {worse:.0f}")
