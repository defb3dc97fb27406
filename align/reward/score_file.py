"""The rows of a file with their scores: single completions, pairs with who wins, ranked lists."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from align.preference.rows.fields import completion, question, whole
from align.preference.rows.judged import Answer, Judged
from align.preference.rows.layouts import RANKINGS
from align.reward.measures import Scored, contests, wilson
from align.reward.scorer import TOTAL, RewardModel
from data_templates._segments import REPLIES, Message
from finetune.data.layouts import LAYOUTS, Layout, RowProblem, read_rows, recognise_among
from finetune.data.sources import Row, read_source
from finetune.recipe.errors import Problem, UserError

REPAIR = "name the columns so: prompt and completion, or prompt, chosen and rejected"
LENGTH = "length"
"""The rule that the longer of two completions (in characters) is the better one, to hold scores against."""


@dataclass(frozen=True)
class ScoredRow:
    """A row of a file, what it says, and by the names of rewards the scores of its completions.

    ``scores`` is empty where the row has no reply that could be scored.
    """

    row: Row
    judged: Judged
    scores: Mapping[str, list[float]]
    normalised: Mapping[str, list[float]]

    @property
    def ranks(self) -> list[int] | None:
        """Return the completions' places, 0 for the best; None where the row does not say."""
        answers = self.judged.answers
        if self.judged.ordered:
            return list(range(len(answers)))
        scores = [answer.score for answer in answers]
        told = len(answers) > 1 and all(answer.scored for answer in answers)
        return [sum(other > score for other in scores) for score in scores] if told else None

    def line(self) -> dict[str, Any]:
        """Return the row with its rewards, a number for a single completion and a list for several."""
        single = len(self.judged.answers) == 1
        shown = {name: values[0] if single else values for name, values in self.scores.items()}
        shown_normalised = {name: values[0] if single else values for name, values in self.normalised.items()}
        rewards = {**shown, "normalised": shown_normalised} if self.scores else None
        winner = {"winner": self.winner} if self.judged.ordered and self.scores else {}
        return {**self.row.columns, "rewards": rewards, **winner}

    @property
    def winner(self) -> str:
        """Return which completion of a pair has the higher reward in all."""
        chosen, rejected = self.scores[TOTAL]
        return "tie" if chosen == rejected else "chosen" if chosen > rejected else "rejected"


def score_file(model: RewardModel, source: str | list[dict[str, Any]]) -> list[ScoredRow]:
    """Return the rows of a file with their scores.

    Args:
        model: what scores.
        source: file, folder, hub id, or rows.

    Raises:
        UserError: the rows are of no known layout, or the template cannot write them.
    """
    rows = read_source(source)
    where = source if isinstance(source, str) else "rows"
    layout = recognise_among(list(rows[0].columns), READ, columns=None, where=where, repair=REPAIR)
    judged = read_rows(rows, layout, None)
    talks = [list(_talks(one)) for one in judged]
    if not any(talks):
        raise UserError(Problem(where, "no row ends with a reply", "completions to score"))
    places = [row.where for row, own in zip(rows, talks, strict=True) for _ in own]
    scores = model.score_talks([talk for own in talks for talk in own], places)
    normalised = model.normalised(scores)
    ends = np.cumsum([len(own) for own in talks]).tolist()
    return [
        ScoredRow(
            row,
            one,
            {name: values[end - len(own) : end] for name, values in scores.items() if own},
            {name: values[end - len(own) : end] for name, values in normalised.items() if own},
        )
        for row, one, own, end in zip(rows, judged, talks, ends, strict=True)
    ]


def write_rows(rows: Sequence[ScoredRow], path: Path) -> None:
    """Write each row with its rewards as a line of JSON."""
    lines = [json.dumps(row.line(), ensure_ascii=False, default=str) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def summary(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """Return what is told of all rows: of each reward its spread, and how often it agrees with the file.

    A comparison counts once, however many completions it has; the rule that the longer one is better stands
    beside the rewards.
    """
    usable = [row for row in rows if row.scores]
    compared = [row for row in usable if row.ranks is not None and len(set(row.ranks)) > 1]
    found: dict[str, Any] = {"rows": len(rows), "without_reply": len(rows) - len(usable), "rewards": {}}
    for name in usable[0].scores:
        values = np.asarray([value for row in usable for value in row.scores[name]])
        spread = {"mean": values.mean(), "deviation": values.std(), "min": values.min(), "max": values.max()}
        own = {key: float(value) for key, value in spread.items()} | {"completions": len(values)}
        agreement = _agreement(compared, [row.scores[name] for row in compared]) if compared else {}
        found["rewards"][name] = own | agreement
    if compared:
        longer = [[float(len(_said(a))) for a in row.judged.answers] for row in compared]
        found["rewards"][LENGTH] = _agreement(compared, longer)
    return found


def _agreement(rows: Sequence[ScoredRow], values: Sequence[Sequence[float]]) -> dict[str, Any]:
    sizes = np.asarray([len(own) for own in values])
    ranks = np.asarray([rank for row in rows for rank in row.ranks or []], dtype=np.int32)
    flat = np.asarray([value for own in values for value in own])
    pairs = contests(Scored(flat, ranks, np.zeros(len(flat), dtype=np.int64), sizes))
    share = pairs.share(pairs.leads)
    return {"comparisons": len(rows), "accuracy": share, "interval": list(wilson(share, len(rows)))}


def _talks(judged: Judged) -> Iterator[list[Message]]:
    """Yield a row's conversations, one a completion; none where one of them ends without a reply."""
    if all(answer.reply is not None and _said(answer).strip() for answer in judged.answers):
        for answer in judged.answers:
            assert answer.reply is not None
            yield [*answer.prompt, answer.reply]


def _said(answer: Answer) -> str:
    return answer.reply.content if answer.reply is not None else ""


def _responses(columns: Mapping[str, Any]) -> Judged:
    """Return completions of a prompt of which nobody said which is better."""
    if not isinstance(columns["responses"], list) or not columns["responses"]:
        raise RowProblem("responses", "no list", "a list of completions")
    asked, answers = question(columns, "prompt"), []
    for index, entry in enumerate(columns["responses"]):
        field = f"responses[{index}]"
        turns, reply = whole(asked, completion({field: entry}, field), field)
        answers.append(Answer(tuple(turns), reply))
    return Judged(tuple(answers))


def _asked(columns: Mapping[str, Any]) -> Judged:
    """Return a completion behind its prompt, which may be a dialogue."""
    turns, reply = whole(question(columns, "prompt"), completion(columns, "completion"), "completion")
    return Judged((Answer(tuple(turns), reply),))


def _last(layout: Layout[list[Message]], columns: Mapping[str, Any]) -> Judged:
    """Return a conversation's last turn as its completion."""
    turns = layout.read(columns)
    reply = turns[-1] if turns[-1].role in REPLIES else None
    return Judged((Answer(tuple(turns[:-1] if reply else turns), reply),))


READ: Sequence[Layout[Judged]] = (
    *RANKINGS,
    Layout("prompt/responses", ("prompt", "responses"), _responses),
    Layout("prompt/completion", ("prompt", "completion"), _asked),
    *(Layout(one.name, one.required, partial(_last, one), one.nullable) for one in LAYOUTS),
)
"""Comparisons first; then single completions, in every layout that instructions come in."""
