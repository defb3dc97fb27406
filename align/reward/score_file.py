"""Score a file with a reward model: single completions, preference pairs, ranked lists."""

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

REPAIR = "rename the columns: prompt and completion, or prompt, chosen and rejected"
LENGTH = "length"
"""Longest-wins baseline: the longer completion (in characters) is predicted to be better."""


@dataclass(frozen=True)
class ScoredRow:
    """A row with the scores of its completions by reward name.

    ``scores`` is empty if the row has no reply to score.
    """

    row: Row
    judged: Judged
    scores: Mapping[str, list[float]]
    normalised: Mapping[str, list[float]]

    @property
    def ranks(self) -> list[int] | None:
        """Return the completions' ranks, 0 for the best; None if the row is unranked."""
        answers = self.judged.answers
        if self.judged.ordered:
            return list(range(len(answers)))
        scores = [answer.score for answer in answers]
        told = len(answers) > 1 and all(answer.scored for answer in answers)
        return [sum(other > score for other in scores) for score in scores] if told else None

    def line(self) -> dict[str, Any]:
        """Return the row with its rewards: a number for a single completion, a list for several."""
        single = len(self.judged.answers) == 1
        shown = {name: values[0] if single else values for name, values in self.scores.items()}
        shown_normalised = {name: values[0] if single else values for name, values in self.normalised.items()}
        rewards = {**shown, "normalised": shown_normalised} if self.scores else None
        winner = {"winner": self.winner} if self.judged.ordered and self.scores else {}
        return {**self.row.columns, "rewards": rewards, **winner}

    @property
    def winner(self) -> str:
        """Return the completion of a pair with the higher total reward."""
        chosen, rejected = self.scores[TOTAL]
        return "tie" if chosen == rejected else "chosen" if chosen > rejected else "rejected"


def score_file(model: RewardModel, source: str | list[dict[str, Any]]) -> list[ScoredRow]:
    """Score the completions of every row of a file.

    Args:
        model: the reward model.
        source: file, folder, hub id, or rows.

    Raises:
        UserError: unknown layout of the rows, or the template cannot render them.
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
    """Write the rows with their rewards as JSON Lines."""
    lines = [json.dumps(row.line(), ensure_ascii=False, default=str) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def summary(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """Return statistics per reward: mean, std, min, max, and accuracy against the file's ranking.

    Each comparison has weight 1, whatever its number of completions. The longest-wins baseline is included.
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
    """Yield a row's conversations, one per completion; none if any of them ends without a reply."""
    if all(answer.reply is not None and _said(answer).strip() for answer in judged.answers):
        for answer in judged.answers:
            assert answer.reply is not None
            yield [*answer.prompt, answer.reply]


def _said(answer: Answer) -> str:
    return answer.reply.content if answer.reply is not None else ""


def _responses(columns: Mapping[str, Any]) -> Judged:
    """Read the unranked completions of a prompt."""
    if not isinstance(columns["responses"], list) or not columns["responses"]:
        raise RowProblem("responses", "not a list, or empty", "a list of completions")
    asked, answers = question(columns, "prompt"), []
    for index, entry in enumerate(columns["responses"]):
        field = f"responses[{index}]"
        turns, reply = whole(asked, completion({field: entry}, field), field)
        answers.append(Answer(tuple(turns), reply))
    return Judged(tuple(answers))


def _asked(columns: Mapping[str, Any]) -> Judged:
    """Read a prompt, which may be a dialogue, with one completion."""
    turns, reply = whole(question(columns, "prompt"), completion(columns, "completion"), "completion")
    return Judged((Answer(tuple(turns), reply),))


def _last(layout: Layout[list[Message]], columns: Mapping[str, Any]) -> Judged:
    """Read a conversation with its last turn as the completion."""
    turns = layout.read(columns)
    reply = turns[-1] if turns[-1].role in REPLIES else None
    return Judged((Answer(tuple(turns[:-1] if reply else turns), reply),))


READ: Sequence[Layout[Judged]] = (
    *RANKINGS,
    Layout("prompt/responses", ("prompt", "responses"), _responses),
    Layout("prompt/completion", ("prompt", "completion"), _asked),
    *(Layout(one.name, one.required, partial(_last, one), one.nullable) for one in LAYOUTS),
)
"""Comparisons first, then single completions in every instruction layout."""
