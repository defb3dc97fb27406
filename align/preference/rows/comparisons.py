"""Build comparisons from preference rows: unusable rows are dropped, counted and reported."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isnan, nan

from align.preference.rows.judged import Answer, Comparison, Judged, Turns
from align.preference.settings import PreferenceSettings
from finetune.data.report import DataReport
from finetune.recipe.errors import Problem, UserError

SWAPPED = "dropped: the rejected completion has the higher score"
NO_REPLY = "dropped: a dialogue without a final reply"
EMPTY = "dropped: empty completion"
EMPTY_TURN = "dropped: empty turn in the prompt"
DIFFERENT = "dropped: chosen and rejected have different prompts"
DIFFERENT_KEPT = "with different prompts of chosen and rejected: the chosen one's is used for both"
IDENTICAL = "dropped: identical chosen and rejected"
TIE = "dropped: tie"
TIE_KEPT = "with tied scores, kept in the row's order"
ONE_LEFT = "dropped: fewer than two distinct completions"
SOME_UNUSABLE = "with empty completions, which are dropped"
SOME_IDENTICAL = "with duplicate completions, which are dropped"
SOME_TIES = "with tied completions, which share a rank"

Count = Callable[[str], None]


class LeftOut(Exception):
    """Raised for a row whose completions cannot be compared; the text is the reason."""


def comparisons(
    rows: Sequence[tuple[Judged, str]], settings: PreferenceSettings, *, source: int, report: DataReport
) -> list[Comparison]:
    """Return the comparisons (and labeled completions) of a source's usable rows.

    Args:
        rows: the rows as read, with their locations.
        settings: how ties and pairs with different prompts are handled.
        source: index of the source.
        report: counts every dropped or changed row, with the location of the first.

    Raises:
        UserError: most scored pairs have the higher score on the rejected completion: swapped columns.
    """
    found = DataReport()
    kept = []
    for judged, where in rows:
        try:
            compared = _comparison(judged, where, settings, partial(found.count, example=where))
            kept.append(replace(compared, source=source))
        except LeftOut as why:
            found.count(str(why), where)
    _refuse_exchanged(rows, found)
    for what, number in found.counts.items():
        report.counts[what] = report.counts.get(what, 0) + number
        report.examples.setdefault(what, found.examples[what])
    return kept


def _refuse_exchanged(rows: Sequence[tuple[Judged, str]], found: DataReport) -> None:
    swapped = found.counts.get(SWAPPED, 0)
    scored = sum(judged.ordered and all(answer.scored for answer in judged.answers) for judged, _ in rows)
    # A few such pairs are label noise and are dropped; a majority means that the columns are swapped.
    if 2 * swapped > scored:
        told = f"{swapped} of {scored} scored pairs have a higher score for rejected than for chosen"
        repair = "swap them with data.columns={chosen: rejected, rejected: chosen}, and the score columns too"
        where = found.examples[SWAPPED]
        raise UserError(Problem(where, told, "a higher score for chosen", repair))


def _comparison(judged: Judged, where: str, settings: PreferenceSettings, count: Count) -> Comparison:
    for note in judged.notes:
        count(note)
    answers = _one_prompt(_said(judged.answers, count), settings.on_different_prompts, count)
    if any(not turn.content.strip() for turn in answers[0].prompt):
        raise LeftOut(EMPTY_TURN)
    if len(judged.answers) == 1:
        return _compared(answers, (0,), judged.margin, where)
    return _ranked(answers, judged, keep_ties=settings.on_tie == "keep", where=where, count=count)


def _said(answers: Sequence[Answer], count: Count) -> list[Answer]:
    """Return the non-empty completions; a pair or a labeled row with an empty one is dropped."""
    kept = [answer for answer in answers if answer.reply is not None and answer.reply.content.strip()]
    if len(kept) < len(answers):
        if len(answers) <= 2:
            raise LeftOut(NO_REPLY if any(answer.reply is None for answer in answers) else EMPTY)
        count(SOME_UNUSABLE)
        if len(kept) < 2:
            raise LeftOut(ONE_LEFT)
    return kept


def _one_prompt(answers: list[Answer], policy: str, count: Count) -> list[Answer]:
    """Return completions of one prompt."""
    if len({_words(answer.prompt) for answer in answers}) < 2:
        return answers
    if policy == "drop":
        raise LeftOut(DIFFERENT)
    count(DIFFERENT_KEPT)
    return [replace(answer, prompt=answers[0].prompt) for answer in answers]


def _words(prompt: Turns) -> tuple[tuple[str, str, str], ...]:
    return tuple((turn.role, turn.content.strip(), turn.context.strip()) for turn in prompt)


def _ranked(
    answers: list[Answer], judged: Judged, *, keep_ties: bool, where: str, count: Count
) -> Comparison:
    """Return the completions ranked, best first.

    Raises:
        DroppedRow: the completions have no order.
    """
    scored = all(answer.scored for answer in answers)
    if not judged.ordered:
        # A stable sort: tied completions keep the row's order.
        answers = sorted(answers, key=lambda answer: -answer.score)
    different = _different(answers)
    if len(different) < len(answers):
        if len(judged.answers) == 2:
            raise LeftOut(IDENTICAL)
        count(SOME_IDENTICAL)
    if len(different) < 2:
        raise LeftOut(ONE_LEFT)
    scores = [answer.score for answer in different]
    if judged.ordered and scored and scores[0] < scores[-1]:
        raise LeftOut(SWAPPED)
    if scored and scores[0] == scores[-1]:
        if not (judged.ordered and keep_ties):
            raise LeftOut(TIE)
        count(TIE_KEPT)
    # `index` finds the first of equal scores, so that ties share the better rank.
    ranks = tuple(range(len(different))) if judged.ordered else tuple(scores.index(score) for score in scores)
    if len(set(ranks)) < len(ranks):
        count(SOME_TIES)
    return _compared(different, ranks, judged.margin, where)


def _different(answers: Sequence[Answer]) -> list[Answer]:
    """Return the distinct completions, each at its best rank."""
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(_reply(answer).strip(), answer)
    return list(first.values())


def _reply(answer: Answer) -> str:
    assert answer.reply is not None
    return answer.reply.content


def _compared(answers: Sequence[Answer], ranks: tuple[int, ...], margin: float, where: str) -> Comparison:
    replies = tuple(answer.reply for answer in answers if answer.reply is not None)
    scores = tuple(answer.score for answer in answers)
    lead = scores[0] - scores[-1] if len(scores) > 1 else nan
    return Comparison(answers[0].prompt, replies, scores, ranks, lead if isnan(margin) else margin, where)


def unpaired(row: Comparison) -> list[Comparison]:
    """Split a pair into two labeled rows: the chosen completion is good, the rejected one bad."""
    both = zip(row.replies, (1.0, 0.0), strict=True)
    return [replace(row, replies=(reply,), scores=(label,), ranks=(0,), margin=nan) for reply, label in both]


def count_contradictions(rows: Sequence[Comparison], report: DataReport) -> None:
    """Count pairs and labels that contradict an earlier one about the same completions."""
    first: dict[object, Comparison] = {}
    for row in rows:
        # Unordered: a pair and its swap have the same key.
        said = frozenset(reply.content.strip() for reply in row.replies)
        earlier = first.setdefault((_words(row.prompt), said), row)
        best, other = row.replies[0].content.strip(), earlier.replies[0].content.strip()
        labels = len(row.replies) == 1 and row.scores != earlier.scores
        if len(row.replies) < 3 and (best != other or labels):
            report.count("contradict an earlier one, kept", f"{row.where} and {earlier.where}")
