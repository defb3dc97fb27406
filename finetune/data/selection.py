"""Data selection: filter by reply length and rating, drop near duplicates, take the n best or random rows.

Few good rows teach as much as many: 1,000 chosen by hand (LIMA, arXiv 2305.11206), those rated at least 4.5
by a judge (AlpaGasus, arXiv 2307.08701), the 1,000 with the longest replies (Zhao et al. 2024, arXiv
2402.04833).
"""

from collections.abc import Callable, Sequence

import numpy as np

from data_templates._segments import REPLIES
from finetune.data.conversation import Conversation
from finetune.data.near_duplicates import near_duplicates
from finetune.data.report import DataReport
from finetune.recipe.settings import SelectSettings


def select(
    rows: Sequence[Conversation], chosen: SelectSettings, *, random: np.random.Generator, report: DataReport
) -> list[Conversation]:
    """Return the rows selected by a recipe's ``select``, in source order; ``report`` counts the others.

    Order of the filters: length and rating, near duplicates, number of rows.
    """
    # Cheap filters first; near-duplicate detection is the expensive one.
    kept = _within(rows, chosen, report)
    if chosen.distinct is not None:
        kept = _distinct(kept, chosen.distinct, report)
    if chosen.rows is not None and chosen.rows < len(kept):
        order = _order(kept, chosen.rows_by, random)
        numbers = set(order[: chosen.rows])
        for index, row in enumerate(kept):
            if index not in numbers:
                report.count(f"dropped: select.rows={chosen.rows}", row.where)
        kept = [row for index, row in enumerate(kept) if index in numbers]
    return kept


def reply_characters(row: Conversation) -> int:
    """Return the total number of characters of a row's replies."""
    return sum(len(turn.content) for turn in row.messages if turn.role in REPLIES)


def _within(rows: Sequence[Conversation], chosen: SelectSettings, report: DataReport) -> list[Conversation]:
    least, most, score = chosen.min_reply_characters, chosen.max_reply_characters, chosen.min_score
    kept = []
    for row in rows:
        length = reply_characters(row)
        if length < least:
            report.count(f"dropped: replies shorter than {least} characters", row.where)
        elif most is not None and length > most:
            report.count(f"dropped: replies longer than {most} characters", row.where)
        elif score is not None and row.score < score:
            report.count(f"dropped: {chosen.score} below {score:g}", row.where)
        else:
            kept.append(row)
    return kept


def _distinct(rows: Sequence[Conversation], threshold: float, report: DataReport) -> list[Conversation]:
    texts = ["\n".join(part for _, *parts in row.words for part in parts) for row in rows]
    kept = []
    for row, twin in zip(rows, near_duplicates(texts, threshold), strict=True):
        if twin is None:
            kept.append(row)
        else:
            what = f"dropped: at least {threshold:.0%} identical to an earlier row"
            report.count(what, f"{row.where} repeats {rows[twin].where}")
    return kept


def _order(rows: Sequence[Conversation], rows_by: str, random: np.random.Generator) -> list[int]:
    """Return the rows' indices, best first; ties go to the earlier row."""
    if rows_by == "random":
        order: list[int] = random.permutation(len(rows)).tolist()
        return order
    value: Callable[[Conversation], float] = reply_characters if rows_by == "length" else _score
    # sorted() is stable: ties stay in source order.
    return sorted(range(len(rows)), key=lambda index: -value(rows[index]))


def _score(row: Conversation) -> float:
    return row.score
