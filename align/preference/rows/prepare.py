"""Preference data of a run: tokenized comparisons and labeled completions."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from align.preference.rows.comparison_rows import ComparisonRows, PreferenceKind
from align.preference.rows.comparisons import Comparison
from align.preference.rows.dataset import PreferenceGroups, PreparedPreferences
from align.preference.rows.encode import LengthLimits, encode_comparisons
from align.preference.settings import (
    PreferenceSettings,
    prompt_length_problems,
    scaled_prompt_length,
)
from finetune.data.conversation import Conversation
from finetune.data.mapped_cache import Arrays
from finetune.data.pipeline import EncodedIndex, EncodedRows, prepare
from finetune.data.report import DataReport
from finetune.data.row_store import Rows
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.limits import AtMost, Change
from finetune.training.context import RunContext
from finetune.training.model import TextEncoding


def load_preferences(
    ctx: RunContext,
    settings: PreferenceSettings,
    text: TextEncoding,
    *,
    kind: PreferenceKind = "rankings",
    use_margin: bool = False,
) -> PreparedPreferences:
    """Read and tokenize a recipe's preference data, and log the data report.

    Args:
        ctx: the run.
        settings: its data section.
        text: template and tokenizer.
        kind: comparisons, or labeled completions.
        use_margin: whether the loss uses the column ``margin``; the report names it otherwise.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    seed = ctx.settings.train.seed
    with ctx.timed("data"):
        data = prepare_preferences(
            settings,
            text.encoder,
            max_length=text.max_length,
            seed=seed,
            kind=kind,
            use_margin=use_margin,
        )
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
    use_margin: bool = False,
) -> PreparedPreferences:
    """Read, split and tokenize the preference data of a data section.

    Args:
        settings: the recipe's data section.
        encoder: template and tokenizer.
        max_length: maximum tokens of a prompt with one completion.
        seed: samples the held-out rows and a mixture's rows.
        kind: ``rankings``: two or more completions of a prompt (reward models, DPO, RRHF, PRO); ``labels``:
            one completion that is good or bad (KTO).
        use_margin: whether the loss uses the column ``margin``.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or no row is usable.
    """
    comparison_kind = Comparisons.of(settings, encoder, max_length, kind, use_margin=use_margin)
    data = prepare(comparison_kind, settings, seed=seed)
    train = PreferenceGroups.of(data.train)
    held_out = None if data.held_out is None else PreferenceGroups.of(data.held_out)
    _fill_preference_report(train, data.report)
    limit, used = settings.max_prompt_length, comparison_kind.limits.max_prompt_length
    if limit is not None and used < limit:
        change = Change("data.max_prompt_length", limit, used, f"half of {max_length} tokens of a row")
        data.report.notes.insert(0, change.line())
    samples = data.train.samples if data.held_out is None else data.held_out.samples
    return PreparedPreferences(train, held_out, samples, data.report)


def _length_limits(settings: PreferenceSettings, max_length: int) -> LengthLimits:
    max_prompt_length = settings.max_prompt_length or max_length // 2
    if isinstance(max_prompt_length, AtMost):
        max_prompt_length = scaled_prompt_length(max_prompt_length, max_length)
    # Where `max_length` is auto; a rule of recipes compares a given one.
    if problems := [*prompt_length_problems(max_prompt_length, max_length)]:
        raise UserError(problems)
    return LengthLimits(max_length, max_prompt_length, settings.overflow == "drop")


@dataclass(frozen=True)
class Comparisons:
    """Preferences, as a kind of tokenized rows: each is a prompt with its completions.

    Attributes:
        rows: how comparisons are read and held out.
        encoder: template and tokenizer.
        limits: the maximum lengths.
    """

    rows: ComparisonRows
    encoder: Encoder
    limits: LengthLimits

    @staticmethod
    def of(
        settings: PreferenceSettings,
        encoder: Encoder,
        max_length: int,
        kind: PreferenceKind = "rankings",
        *,
        use_margin: bool = False,
    ) -> "Comparisons":
        """Return the kind with a data section's settings; raises UserError if the limits conflict."""
        rows = ComparisonRows(settings, kind, use_margin)
        return Comparisons(rows, encoder, _length_limits(settings, max_length))

    def encode(self, rows: Rows[Comparison], index: EncodedIndex, report: DataReport) -> Arrays:
        """Return the arrays of ``PreferenceGroups``."""
        return encode_comparisons(rows, self.encoder, self.limits, index, report)

    def samples(self, rows: Rows[Comparison], limit: int | None) -> Iterator[Conversation]:
        """Return the rows as conversations, one per location, that end with the best completion."""
        return islice(self._distinct(rows), limit)

    def _distinct(self, rows: Rows[Comparison]) -> Iterator[Conversation]:
        seen: set[str] = set()
        for row in rows:
            if row.location not in seen:
                seen.add(row.location)
                yield Conversation([*row.prompt, row.replies[0]], row.location, row.source)

    def raise_if_empty(self, key: str, encoded: EncodedRows, report: DataReport) -> None:
        """Raise UserError if no row was tokenized."""
        if not len(encoded):
            purpose = "to evaluate on" if key == "data.held_out" else "to train on"
            actual = f"no rows {purpose}: {'; '.join(report.lines()[1:])}"
            remedy = "raise data.max_length" if report.num_too_long else "choose another data.template"
            repair = f"check the rows named above, or {remedy}"
            raise UserError(Problem(key, actual, "distinct completions", repair))

    def cache_key(self) -> list[Any]:
        """Return all that decides the tokens and the report besides the data section."""
        rows = [self.rows.kind, self.rows.use_margin]
        return [self.encoder.fingerprint(), asdict(self.limits), *rows]

    def code(self) -> tuple[Path, ...]:
        """Return this folder."""
        return (Path(__file__).parent,)


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
