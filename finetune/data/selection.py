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
from finetune.recipe.settings import SelectSettings


def select_rows(
    rows: Sequence[Conversation], settings: SelectSettings, *, rng: np.random.Generator, report: DataReport
) -> list[Conversation]:
    """Return the rows selected by a recipe's ``select``, in source order; ``report`` counts the others.

    Order of the filters: length and rating, near duplicates, number of rows.
    """
    # Cheap filters first; near-duplicate detection is the expensive one.
    selected = _filter_length_and_rating(rows, settings, report)
    if settings.near_dedup is not None:
        selected = _drop_near_duplicates(selected, settings.near_dedup, report)
    if settings.rows is not None and settings.rows < len(selected):
        order = _ranked_ids(selected, settings.rows_by, rng)
        selected_ids = set(order[: settings.rows])
        for index, row in enumerate(selected):
            if index not in selected_ids:
                report.count(f"dropped: select.rows={settings.rows}", row.location)
        selected = [row for index, row in enumerate(selected) if index in selected_ids]
    return selected


def num_reply_characters(row: Conversation) -> int:
    """Return the total number of characters of a row's replies."""
    return sum(len(turn.full_text) for turn in row.messages if turn.role in REPLY_ROLES)


def _filter_length_and_rating(
    rows: Sequence[Conversation], settings: SelectSettings, report: DataReport
) -> list[Conversation]:
    min_characters, max_characters, min_score = (
        settings.min_reply_characters,
        settings.max_reply_characters,
        settings.min_score,
    )
    selected = []
    for row in rows:
        length = num_reply_characters(row)
        if length < min_characters:
            report.count(f"dropped: replies shorter than {min_characters} characters", row.location)
        elif max_characters is not None and length > max_characters:
            report.count(f"dropped: replies longer than {max_characters} characters", row.location)
        elif min_score is not None and row.score < min_score:
            report.count(f"dropped: {settings.score} below {min_score:g}", row.location)
        else:
            selected.append(row)
    return selected


def _drop_near_duplicates(
    rows: Sequence[Conversation], threshold: float, report: DataReport
) -> list[Conversation]:
    # Without the roles, which most conversations share: they would raise every overlap.
    texts = ["\n".join(part for _, *parts in row.text_key for part in parts) for row in rows]
    selected = []
    for row, duplicate_of in zip(rows, near_duplicates(texts, threshold), strict=True):
        if duplicate_of is None:
            selected.append(row)
        else:
            label = f"dropped: at least {threshold:.0%} identical to an earlier row"
            report.count(label, f"{row.location} repeats {rows[duplicate_of].location}")
    return selected


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
