"""Build comparisons from preference rows: unusable rows are dropped, counted and reported."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan, nan

from align.preference.rows.layouts import PreferenceRow, ScoredCompletion, Turns
from align.preference.settings import PreferenceSettings
from finetune.data.report import DataReport
from finetune.data.row_store import text_digest
from finetune.recipe.errors import Problem, UserError

DROPPED_SWAPPED = "dropped: the rejected completion has the higher score"
DROPPED_NO_REPLY = "dropped: a dialogue without a final reply"
DROPPED_EMPTY = "dropped: empty completion"
DROPPED_EMPTY_PROMPT_TURN = "dropped: empty turn in the prompt"
DROPPED_DIFFERENT_PROMPTS = "dropped: chosen and rejected have different prompts"
KEPT_DIFFERENT_PROMPTS = "with different prompts of chosen and rejected: the chosen one's is used for both"
DROPPED_IDENTICAL = "dropped: identical chosen and rejected"
DROPPED_TIE = "dropped: tie"
KEPT_TIE = "with tied scores, kept in the row's order"
DROPPED_ONE_LEFT = "dropped: fewer than two distinct completions"
WITH_EMPTY_COMPLETIONS = "with empty completions, which are dropped"
WITH_DUPLICATES = "with duplicate completions, which are dropped"
WITH_TIES = "with tied completions, which share a rank"

CountRow = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt and its completions, best first, ready for tokenization.

    ``ranks``: 0 is the best, ties share a rank (0, 1, 1, 3). ``scores``: NaN if the data has none; for labels
    1 (good) or 0 (bad). ``margin``: preference margin of the first over the last, NaN if unknown.
    ``location``: ``file:line``, ``source``: index of the source.
    """

    prompt: Turns
    replies: Turns
    scores: tuple[float, ...]
    ranks: tuple[int, ...]
    margin: float
    location: str
    source: int = 0

    @property
    def text_key(self) -> tuple[tuple[str, ...], ...]:
        """Return the key by which duplicate rows are found: all turns, the ranks and the label."""
        turns = [turn.key for turn in (*self.prompt, *self.replies)]
        label = str(self.scores[0]) if len(self.replies) == 1 else ""
        return (*turns, ("ranks", str(self.ranks), label))


class DroppedRow(Exception):
    """Raised for a row whose completions cannot be compared; the text is the reason."""


def build_comparisons(
    rows: Iterable[tuple[PreferenceRow, str]],
    settings: PreferenceSettings,
    *,
    source: int,
    report: DataReport,
) -> Iterator[Comparison]:
    """Yield the comparisons (and labeled completions) of a source's usable rows.

    Args:
        rows: the rows as read, with their locations.
        settings: how ties and pairs with different prompts are handled.
        source: index of the source.
        report: counts every dropped or changed row, with the location of the first.

    Raises:
        UserError: at the end, if most scored pairs have the higher score on the rejected completion: swapped
            columns.
    """
    # A report of this source alone: swapped columns are a majority among its own rows.
    source_report, scored = DataReport(), 0
    for row, location in rows:
        scored += row.ordered and all(completion.scored for completion in row.completions)
        try:
            comparison = _build_comparison(
                row, location, settings, partial(source_report.count, example=location)
            )
        except DroppedRow as reason:
            source_report.count(str(reason), location)
        else:
            yield replace(comparison, source=source)
    _check_swapped_columns(scored, source_report)
    report.merge(source_report)


def _check_swapped_columns(scored: int, source_report: DataReport) -> None:
    swapped = source_report.counts.get(DROPPED_SWAPPED, 0)
    # A few such pairs are label noise and are dropped; a majority means that the columns are swapped.
    if 2 * swapped > scored:
        actual = f"{swapped} of {scored} scored pairs have a higher score for rejected than for chosen"
        repair = (
            "swap them with 'data.columns={chosen: rejected, rejected: chosen}', and the score columns too"
        )
        location = source_report.examples[DROPPED_SWAPPED]
        raise UserError(Problem(location, actual, "a higher score for chosen", repair))


def _build_comparison(
    row: PreferenceRow, location: str, settings: PreferenceSettings, count: CountRow
) -> Comparison:
    for note in row.notes:
        count(note)
    completions = _unify_prompts(_non_empty(row.completions, count), settings.on_different_prompts, count)
    if any(turn.is_empty for turn in completions[0].prompt):
        raise DroppedRow(DROPPED_EMPTY_PROMPT_TURN)
    if len(row.completions) == 1:
        return _to_comparison(completions, (0,), row.margin, location)
    return _rank_completions(
        completions, row, keep_ties=settings.on_tie == "keep", location=location, count=count
    )


def _non_empty(completions: Sequence[ScoredCompletion], count: CountRow) -> list[ScoredCompletion]:
    """Return the non-empty completions; a pair or a labeled row with an empty one is dropped."""
    non_empty = [
        completion
        for completion in completions
        if completion.reply is not None and not completion.reply.is_empty
    ]
    if len(non_empty) < len(completions):
        if len(completions) <= 2:
            raise DroppedRow(
                DROPPED_NO_REPLY
                if any(completion.reply is None for completion in completions)
                else DROPPED_EMPTY
            )
        count(WITH_EMPTY_COMPLETIONS)
        if len(non_empty) < 2:
            raise DroppedRow(DROPPED_ONE_LEFT)
    return non_empty


def _unify_prompts(
    completions: list[ScoredCompletion], policy: str, count: CountRow
) -> list[ScoredCompletion]:
    """Return completions of one prompt."""
    if len({_prompt_key(completion.prompt) for completion in completions}) < 2:
        return completions
    if policy == "drop":
        raise DroppedRow(DROPPED_DIFFERENT_PROMPTS)
    count(KEPT_DIFFERENT_PROMPTS)
    return [replace(completion, prompt=completions[0].prompt) for completion in completions]


def _prompt_key(prompt: Turns) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(text.strip() for text in turn.key) for turn in prompt)


def _rank_completions(
    completions: list[ScoredCompletion],
    row: PreferenceRow,
    *,
    keep_ties: bool,
    location: str,
    count: CountRow,
) -> Comparison:
    """Return the completions ranked, best first.

    Raises:
        DroppedRow: the completions have no order.
    """
    scored = all(completion.scored for completion in completions)
    if not row.ordered:
        # A stable sort: tied completions keep the row's order.
        completions = sorted(completions, key=lambda completion: -completion.score)
    distinct = _distinct_completions(completions)
    if len(distinct) < len(completions):
        if len(row.completions) == 2:
            raise DroppedRow(DROPPED_IDENTICAL)
        count(WITH_DUPLICATES)
    if len(distinct) < 2:
        raise DroppedRow(DROPPED_ONE_LEFT)
    scores = [completion.score for completion in distinct]
    if row.ordered and scored and scores[0] < scores[-1]:
        raise DroppedRow(DROPPED_SWAPPED)
    if scored and scores[0] == scores[-1]:
        if not (row.ordered and keep_ties):
            raise DroppedRow(DROPPED_TIE)
        count(KEPT_TIE)
    # `index` finds the first of equal scores, so that ties share the better rank.
    ranks = tuple(range(len(distinct))) if row.ordered else tuple(scores.index(score) for score in scores)
    if len(set(ranks)) < len(ranks):
        count(WITH_TIES)
    return _to_comparison(distinct, ranks, row.margin, location)


def _distinct_completions(completions: Sequence[ScoredCompletion]) -> list[ScoredCompletion]:
    """Return the distinct completions, each at its best rank."""
    first: dict[str, ScoredCompletion] = {}
    for completion in completions:
        first.setdefault(_completion_text(completion).strip(), completion)
    return list(first.values())


def _completion_text(completion: ScoredCompletion) -> str:
    assert completion.reply is not None
    return completion.reply.full_text


def _to_comparison(
    completions: Sequence[ScoredCompletion], ranks: tuple[int, ...], margin: float, location: str
) -> Comparison:
    replies = tuple(completion.reply for completion in completions if completion.reply is not None)
    scores = tuple(completion.score for completion in completions)
    score_gap = scores[0] - scores[-1] if len(scores) > 1 else nan
    return Comparison(
        completions[0].prompt, replies, scores, ranks, score_gap if isnan(margin) else margin, location
    )


def split_pair(row: Comparison) -> list[Comparison]:
    """Split a pair into two labeled rows: the chosen completion is good, the rejected one bad."""
    labeled = zip(row.replies, (1.0, 0.0), strict=True)
    return [
        replace(row, replies=(reply,), scores=(label,), ranks=(0,), margin=nan) for reply, label in labeled
    ]


def count_contradictions(rows: Iterable[Comparison], report: DataReport) -> None:
    """Count pairs and labels that contradict an earlier one about the same completions."""
    first: dict[tuple[int, int], tuple[str, int, tuple[float, ...]]] = {}
    for row in rows:
        texts = [reply.full_text.strip() for reply in row.replies]
        # Sorted: a pair and its swap have the same key.
        key = (text_digest(_prompt_key(row.prompt)), text_digest(sorted(set(texts))))
        best = text_digest(texts[0])
        earlier, earlier_best, earlier_scores = first.setdefault(key, (row.location, best, row.scores))
        label_differs = len(texts) == 1 and row.scores != earlier_scores
        if len(texts) < 3 and (best != earlier_best or label_differs):
            report.count("contradict an earlier one, kept", f"{row.location} and {earlier}")
