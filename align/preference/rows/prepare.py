"""Preference data pipeline: read, filter, split, tokenize and report a recipe's data section."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np

from align.preference.rows.comparisons import comparisons, count_contradictions, unpaired
from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences
from align.preference.rows.encode import Room, tokenise
from align.preference.rows.judged import Comparison, Judged
from align.preference.rows.layouts import LABELLED, PAIRS, RANKINGS
from align.preference.settings import PreferenceSettings
from finetune.data.conversation import Conversation
from finetune.data.gather import Place, count_copies, count_seen, held_out_count, places_of, read_place
from finetune.data.layouts import Layout, read_rows, recognise_among
from finetune.data.mixture import Part, mix
from finetune.data.report import DataReport, SourceReport
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError

Kind = Literal["rankings", "labels"]
LAYOUTS: dict[Kind, Sequence[Layout[Judged]]] = {"rankings": RANKINGS, "labels": (*LABELLED, *PAIRS)}
REPAIRS: dict[Kind, str] = {
    "rankings": "map the columns: data.columns={prompt: QUESTION, chosen: BETTER, rejected: WORSE}",
    "labels": "map the columns: data.columns={prompt: QUESTION, completion: REPLY, label: GOOD}",
}
MEANT: dict[Kind, str] = {
    "rankings": "labels are for KTO",
    "labels": "ranked lists are for a reward model, DPO, RRHF or PRO",
}
"""The stages that use rows of the other kind."""

SHOWN_FROM_TRAINING = 64
"""Training prompts for samples if nothing is held out."""


def prepare_preferences(
    settings: PreferenceSettings, encoder: Encoder, *, max_length: int, seed: int, kind: Kind = "rankings"
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
    room = _room(settings, max_length)
    report, aside = DataReport(), DataReport()
    train, held_out = gather_comparisons(settings, seed, report, aside, kind=kind)
    learnt = tokenise(train, encoder, room, cache=settings.cache, report=report)
    _refuse_none("data.source", "to train on", learnt, report)
    measured = None
    if settings.held_out:
        measured = tokenise(held_out, encoder, room, cache=settings.cache, report=aside)
        _refuse_none("data.held_out", "to evaluate on", measured, aside)
        report.held_out = len(measured)
    report.counts |= {f"held out: {what}": number for what, number in aside.counts.items()}
    report.examples |= {f"held out: {what}": where for what, where in aside.examples.items()}
    _tell(learnt, report)
    shown = _kept(train, learnt)[:SHOWN_FROM_TRAINING] if measured is None else _kept(held_out, measured)
    return PreparedPreferences(learnt, measured, shown, report)


def _refuse_selection(settings: PreferenceSettings) -> None:
    chosen = {"data.select": settings.select}
    chosen |= {f"data.mix[{index}].select": part.select for index, part in enumerate(settings.mix or [])}
    if problems := [
        Problem(key, "selects conversations", "null for preference data", "remove it")
        for key, select in chosen.items()
        if select is not None
    ]:
        raise UserError(problems)


def _room(settings: PreferenceSettings, max_length: int) -> Room:
    prompt = settings.max_prompt_length or max_length // 2
    if prompt >= max_length:
        found = f"{prompt}, but prompt and completion together have {max_length} tokens"
        raise UserError(Problem("data.max_prompt_length", found, "less, to leave tokens for completions"))
    return Room(max_length, prompt, settings.too_long == "drop")


def gather_comparisons(
    settings: PreferenceSettings,
    seed: int,
    report: DataReport,
    aside: DataReport,
    *,
    kind: Kind = "rankings",
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
    _refuse_selection(settings)
    places = enumerate(places_of(settings))
    parts = [_part(place, index, seed, settings, kind, report) for index, place in places]
    report.sources = [part.report for part in parts]
    report.layout = " + ".join(dict.fromkeys(source.layout for source in report.sources))
    if settings.mix is None:
        train, held_out = split_by_prompt(parts[0].rows, settings.held_out, seed)
    else:
        train, held_out = mix(parts, settings, seed=seed, report=report)
    if isinstance(settings.held_out, str):
        place = Place("data.held_out", settings.held_out, settings.split, None, settings.columns)
        held_out = _part(place, 0, seed, settings, kind, aside).rows
    every = [row for part in parts for row in part.rows]
    count_copies(every, report)
    count_contradictions(every, report)
    count_seen(held_out, train, aside)
    _count_shared_prompts(held_out, train, aside)
    return train, held_out


class Asking(Protocol):
    """A row with a prompt."""

    @property
    def prompt(self) -> object:
        """Return the prompt, hashable: equal prompts are held out together."""


AskingRow = TypeVar("AskingRow", bound=Asking)


def split_by_prompt(
    rows: list[AskingRow], share: int | float | str, seed: int
) -> tuple[list[AskingRow], list[AskingRow]]:
    """Split rows into training and held-out ones by prompt, so that no prompt is in both.

    Raises:
        UserError: no training rows would be left, or every prompt has more rows than are held out.
    """
    if isinstance(share, str):
        return rows, []
    count = held_out_count(len(rows), share)
    prompts: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        prompts.setdefault(row.prompt, []).append(number)
    together = list(prompts.values())
    chosen: set[int] = set()
    # Greedy: a prompt with more rows than are still wanted is skipped.
    for index in np.random.default_rng([seed, len(rows)]).permutation(len(together)):
        if len(chosen) + len(together[index]) <= count:
            chosen.update(together[index])
    if count and not chosen:
        found = f"{count} of {len(rows)} usable rows, but every prompt has more"
        raise UserError(
            Problem("data.held_out", found, "at least the rows of one prompt", "a larger number, or a file")
        )
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _count_shared_prompts(
    held_out: Sequence[Comparison], train: Sequence[Comparison], aside: DataReport
) -> None:
    learnt = {row.prompt: row.where for row in train}
    for row in held_out:
        if row.prompt in learnt:
            aside.count(
                "with a prompt that is in the training data",
                f"{row.where} has the prompt of {learnt[row.prompt]}",
            )


def _part(
    place: Place, index: int, seed: int, settings: PreferenceSettings, kind: Kind, report: DataReport
) -> Part[Comparison]:
    found = read_place(place, index, seed)
    layout = _layout(list(found[0].columns), place, kind)
    judged = read_rows(found, layout, place.columns)
    pairs = [(said, row.where) for said, row in zip(judged, found, strict=True)]
    rows = comparisons(pairs, settings, source=index, report=report)
    if not rows:
        told = f"no usable comparison: {'; '.join(report.lines()[1:])}"
        repair = "check the rows named above, data.on_different_prompts and data.on_tie"
        raise UserError(Problem(place.key, told, "distinct completions", repair))
    if kind == "labels" and layout in PAIRS:
        report.notes.append(f"pairs of {place.name} split into labels: chosen is good, rejected is bad")
        rows = [half for row in rows for half in unpaired(row)]
    return Part(SourceReport(place.name, layout.name, found=len(found), usable=len(rows)), rows)


def _layout(names: list[str], place: Place, kind: Kind) -> Layout[Judged]:
    """Return the layout of a source; the error names a layout of the other kind."""
    known = {*names, *(place.columns or {})}
    other = LABELLED if kind == "rankings" else RANKINGS
    fits = [layout.name for layout in other if known.issuperset(layout.required)]
    if fits and not any(known.issuperset(layout.required) for layout in LAYOUTS[kind]):
        found = f"layout {fits[0]}: {MEANT[kind]}"
        expected = "; ".join("+".join(layout.required) for layout in LAYOUTS[kind])
        raise UserError(Problem(place.name, found, expected, REPAIRS[kind]))
    return recognise_among(
        names, LAYOUTS[kind], columns=place.columns, where=place.name, repair=REPAIRS[kind]
    )


def _refuse_none(where: str, purpose: str, groups: PreferenceGroups, report: DataReport) -> None:
    if not len(groups):
        found = f"no rows {purpose}: {'; '.join(report.lines()[1:])}"
        remedy = "raise data.max_length" if report.too_long else "choose another data.template"
        repair = f"check the rows named above, or {remedy}"
        raise UserError(Problem(where, found, "distinct completions", repair))


def _kept(rows: Sequence[Comparison], groups: PreferenceGroups) -> list[Conversation]:
    """Return the conversations of tokenized rows, one per row, ending with the best completion."""
    places = set(groups.places)
    kept = {row.where: row for row in rows if row.where in places}.values()
    return [Conversation([*row.prompt, row.replies[0]], row.where, row.source) for row in kept]


def _tell(groups: PreferenceGroups, report: DataReport) -> None:
    """Fill the report: rows and tokens, in all and per source, mean lengths of prompts and completions."""
    lengths = groups.completion_lengths
    owner = np.repeat(np.arange(len(groups)), groups.completions)
    report.rows, report.tokens, report.longest = len(groups), groups.num_tokens, groups.longest
    report.trained_tokens = int(lengths.sum())
    for number, source in enumerate(report.sources):
        own = np.asarray(groups.sources) == number
        source.rows, source.tokens = int(own.sum()), int(groups.lengths[own].sum())
        source.trained_tokens = int(lengths[own[owner]].sum())
    best = groups.ranks == 0
    told = f"{len(lengths)} completions; mean tokens: prompt {groups.prompt_lengths.mean():.0f}"
    if best.all():
        good = int((groups.scores == 1).sum())
        report.notes.append(
            f"{told}, completion {lengths.mean():.0f}; {good} good, {len(lengths) - good} bad"
        )
    else:
        better, worse = lengths[best].mean(), lengths[~best].mean()
        report.notes.append(f"{told}, best completion {better:.0f}, others {worse:.0f}")
