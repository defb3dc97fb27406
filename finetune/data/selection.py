"""Data selection: filter by reply length and rating, drop near duplicates, take the n best or random rows.

Few good rows teach as much as many: 1,000 chosen by hand (LIMA, arXiv 2305.11206), those rated at least 4.5
by a judge (AlpaGasus, arXiv 2307.08701), the 1,000 with the longest replies (Zhao et al. 2024, arXiv
2402.04833).
"""

from collections.abc import Callable, Sequence

import numpy as np

from data_templates.segments import REPLY_ROLES
from finetune.data.conversation import Conversation
from finetune.data.near_duplicates import near_duplicates
from finetune.data.report import DataReport
from finetune.data.row_store import Rows
from finetune.recipe.settings import SelectSettings


def select_rows(
    rows: Rows[Conversation], settings: SelectSettings, *, rng: np.random.Generator, report: DataReport
) -> Rows[Conversation]:
    """Return the rows selected by a recipe's ``select``, in source order; ``report`` counts the others.

    Order of the filters: length and rating, near duplicates, number of rows.
    """
    # Cheap filters first; near-duplicate detection is the expensive one.
    selected = rows.take([index for index, row in enumerate(rows) if _fits(row, settings, report)])
    if settings.near_dedup is not None:
        selected = _drop_near_duplicates(selected, settings.near_dedup, report)
    if settings.rows is not None and settings.rows < len(selected):
        order = _ranked_ids(selected, settings.rows_by, rng)
        selected_ids = set(order[: settings.rows])
        for index, row in enumerate(selected):
            if index not in selected_ids:
                report.count(f"dropped: select.rows={settings.rows}", row.location)
        selected = selected.take(sorted(selected_ids))
    return selected


def num_reply_characters(row: Conversation) -> int:
    """Return the total number of characters of a row's replies."""
    return sum(len(turn.full_text) for turn in row.messages if turn.role in REPLY_ROLES)


def _fits(row: Conversation, settings: SelectSettings, report: DataReport) -> bool:
    """Return whether a row has the required length and rating; count it if not."""
    length = num_reply_characters(row)
    if length < settings.min_reply_characters:
        label = f"dropped: replies shorter than {settings.min_reply_characters} characters"
    elif settings.max_reply_characters is not None and length > settings.max_reply_characters:
        label = f"dropped: replies longer than {settings.max_reply_characters} characters"
    elif settings.min_score is not None and row.score < settings.min_score:
        label = f"dropped: {settings.score} below {settings.min_score:g}"
    else:
        return True
    report.count(label, row.location)
    return False


def _drop_near_duplicates(
    rows: Rows[Conversation], threshold: float, report: DataReport
) -> Rows[Conversation]:
    # Without the roles, which most conversations share: they would raise every overlap.
    texts = ("\n".join(part for _, *parts in row.text_key for part in parts) for row in rows)
    duplicate_of = near_duplicates(texts, threshold)
    label = f"dropped: at least {threshold:.0%} identical to an earlier row"
    for index, original in enumerate(duplicate_of):
        if original is not None:
            report.count(label, f"{rows[index].location} repeats {rows[original].location}")
    return rows.take([index for index, original in enumerate(duplicate_of) if original is None])


def _ranked_ids(rows: Sequence[Conversation], rows_by: str, rng: np.random.Generator) -> list[int]:
    """Return the rows' indices, best first; ties go to the earlier row."""
    if rows_by == "random":
        order: list[int] = rng.permutation(len(rows)).tolist()
        return order
    value: Callable[[Conversation], float] = num_reply_characters if rows_by == "length" else _rating
    # sorted() is stable: ties stay in source order.
    return sorted(range(len(rows)), key=lambda index: -value(rows[index]))


def _rating(row: Conversation) -> float:
    return row.score
