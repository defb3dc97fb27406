"""From what rows say to completions that can be compared: what cannot is left out, counted and told."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isnan, nan

from align.preference.rows.judged import Answer, Comparison, Judged, Turns
from align.preference.settings import PreferenceSettings
from finetune.data.report import DataReport
from finetune.recipe.errors import Problem, UserError

SWAPPED = "left out, their scores say that the rejected one is better"
NO_REPLY = "left out, a dialogue ends without a reply"
EMPTY = "left out, an empty completion"
EMPTY_TURN = "left out, a turn of the prompt is empty"
DIFFERENT = "left out, chosen and rejected answer different prompts"
DIFFERENT_KEPT = "of chosen and rejected to different prompts, both answer the chosen one's now"
IDENTICAL = "left out, chosen and rejected are the same"
TIE = "left out, a tie"
TIE_KEPT = "of equal scores, kept in the row's order"
ONE_LEFT = "left out, fewer than two completions that differ"
SOME_UNUSABLE = "with completions that are empty or no reply, which are left out"
SOME_IDENTICAL = "with completions that repeat another one, which are left out"
SOME_TIES = "with ties among their completions, which share a rank"

Count = Callable[[str], None]


class LeftOut(Exception):
    """A row whose completions cannot be compared; the text says why."""


def comparisons(
    rows: Sequence[tuple[Judged, str]], settings: PreferenceSettings, *, source: int, report: DataReport
) -> list[Comparison]:
    """Return the rows of a source whose completions can be compared, or bear a label.

    Args:
        rows: what each row says, with its place.
        settings: what becomes of ties and of pairs to different prompts.
        source: the source's number.
        report: counts every row that is left out or changed, with the first place.

    Raises:
        UserError: in most pairs that have scores the rejected one's is higher: the columns are exchanged.
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
    if 2 * swapped > scored:
        told = (
            f"in {swapped} of {scored} pairs with scores the rejected one's is higher than the chosen one's"
        )
        repair = (
            "exchange them, with data.columns={chosen: rejected, rejected: chosen} and the scores likewise"
        )
        where = found.examples[SWAPPED]
        raise UserError(Problem(where, told, "a chosen one that is better", repair))


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
    """Return the completions that say something; a pair and a labelled row cannot do without one."""
    kept = [answer for answer in answers if answer.reply is not None and answer.reply.content.strip()]
    if len(kept) < len(answers):
        if len(answers) <= 2:
            raise LeftOut(NO_REPLY if any(answer.reply is None for answer in answers) else EMPTY)
        count(SOME_UNUSABLE)
        if len(kept) < 2:
            raise LeftOut(ONE_LEFT)
    return kept


def _one_prompt(answers: list[Answer], policy: str, count: Count) -> list[Answer]:
    """Return completions that answer the same turns."""
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
    """Return completions in their order, the best first; raises LeftOut where there is none."""
    scored = all(answer.scored for answer in answers)
    if not judged.ordered:
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
    ranks = tuple(range(len(different))) if judged.ordered else tuple(scores.index(score) for score in scores)
    if len(set(ranks)) < len(ranks):
        count(SOME_TIES)
    return _compared(different, ranks, judged.margin, where)


def _different(answers: Sequence[Answer]) -> list[Answer]:
    """Return the completions that differ, each at its best place."""
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
    """Return a pair as two labelled rows: its better completion is good, the other one bad."""
    both = zip(row.replies, (1.0, 0.0), strict=True)
    return [replace(row, replies=(reply,), scores=(label,), ranks=(0,), margin=nan) for reply, label in both]


def count_contradictions(rows: Sequence[Comparison], report: DataReport) -> None:
    """Count the pairs and labels that say the opposite of an earlier one about the same completions."""
    first: dict[object, Comparison] = {}
    for row in rows:
        said = frozenset(reply.content.strip() for reply in row.replies)
        earlier = first.setdefault((_words(row.prompt), said), row)
        best, other = row.replies[0].content.strip(), earlier.replies[0].content.strip()
        labels = len(row.replies) == 1 and row.scores != earlier.scores
        if len(row.replies) < 3 and (best != other or labels):
            report.count("say the opposite of an earlier one, kept", f"{row.where} and {earlier.where}")
