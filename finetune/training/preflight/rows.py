"""Checks of tokenized rows: trained EOS, loss mask, single BOS; and the truncation report."""

from collections.abc import Callable, Collection

import numpy as np

from finetune.data.collate import IGNORED, Example
from finetune.data.dataset import TokenizedRows
from finetune.recipe.errors import Problem
from finetune.training.preflight.ticks import Tick, failed

ENDED = 0.99
"""Share of the untruncated rows that must end with a trained stop token: one in a hundred may be odd."""
BEHIND_STOP = 2
"""Labels that may follow a stop token: ChatML's line feed if every token is trained."""
LEAST_TRAINED = 0.05
"""Share of trained tokens below which we warn: most of the compute then carries no loss."""
MUCH_LOST = 0.05
"""Share of the trained tokens, or of the rows, that ``data.max_length`` may truncate without a warning."""

LONGER = "raise data.max_length if the model has the positions, or set data.too_long=drop"

Names = Callable[[int], str]
"""Returns the text of a token id."""


def ends_learnt(rows: TokenizedRows, stop_ids: Collection[int], *, max_length: int, name_of: Names) -> Tick:
    """Check that the last label of each untruncated row is a stop token (EOS).

    Args:
        rows: the training dataset.
        stop_ids: the tokens that end a reply.
        max_length: rows of this length may be truncated: they count only if they end with a stop token.
        name_of: returns the text of a token id.
    """
    starts = rows.arrays["starts"]
    good = _last_labels_stop(rows, stop_ids)
    whole = good | (np.diff(starts) < max_length)
    names = " or ".join(sorted({name_of(token) for token in stop_ids}))
    if not whole.any():
        detail = f"every row is truncated: none teaches the model to write {names}; {LONGER}"
        return Tick("stop token", detail, warned=True)
    share = float(good[whole].mean())
    if share >= ENDED:
        return Tick("stop token", f"{_percent(share)} of the untruncated rows end with a trained {names}")
    first = int(np.flatnonzero(whole & ~good)[0])
    found = (
        f"{_percent(1 - share)} of the rows do not end with a trained {names} (first: {rows.places[first]}: "
        f"{_how_it_ends(rows[first], stop_ids, name_of)}); the model would never stop"
    )
    expected = f"at least {ENDED:.0%} of the rows with {names} as their last label"
    repair = (
        "in the template's file render the assistant's turn with reply(message): it ends with a trained EOS; "
        "or data.template=chatml"
    )
    return failed("stop token", Problem("data.template", found, expected, repair))


def _last_labels_stop(rows: TokenizedRows, stop_ids: Collection[int]) -> np.ndarray:
    """Return for each row whether a trained stop token is among its last labels."""
    ids, trained, starts = (rows.arrays[key] for key in ("input_ids", "trained", "starts"))
    hits = np.flatnonzero(trained & np.isin(ids, list(stop_ids)))
    last = np.full(len(rows), -1)
    last[np.searchsorted(starts, hits, side="right") - 1] = hits  # a row's last hit overwrites the others
    borders = np.stack([last + 1, starts[1:]], axis=1).ravel()
    behind = np.add.reduceat(np.append(trained, False), borders, dtype=np.int64)[::2]
    behind[last + 1 == starts[1:]] = 0  # for an empty range reduceat returns an element, not 0
    good: np.ndarray = (last >= 0) & (behind <= BEHIND_STOP)
    return good


def _how_it_ends(row: Example, stop_ids: Collection[int], name_of: Names) -> str:
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    last = max((place for place, label in enumerate(labels) if label != IGNORED), default=0)
    if any(token in stop_ids for token in ids[last + 1 :]):
        return "it is in the row, but carries no loss"
    return f"the last trained token is {name_of(ids[last])!r}"


def masks_hold_loss(rows: TokenizedRows) -> Tick:
    """Check that every row has a label after its first token, and report the share of trained tokens."""
    trained, starts = rows.arrays["trained"].copy(), rows.arrays["starts"]
    trained[starts[:-1]] = False  # a row's first token follows nothing, so it is no target
    counts = np.add.reduceat(trained, starts[:-1], dtype=np.int64)
    share = float(counts.sum()) / rows.num_tokens
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        found = f"{len(empty)} of {len(rows)} rows have no trained token (first: {rows.places[empty[0]]})"
        repair = "mark the reply as trained in the template, or remove those rows"
        return failed("loss mask", Problem("data.template", found, "a reply that carries loss", repair))
    detail = f"{_percent(share)} of the tokens are trained, at least {counts.min()} per row"
    few = share < LEAST_TRAINED
    return Tick("loss mask", detail + few * ": very few; does data.columns name the reply?", warned=few)


def begins_once(rows: TokenizedRows, bos_id: int | None, *, wanted: bool, name_of: Names) -> Tick:
    """Check that no row begins with two BOS tokens, and that none lacks the one that its tokenizer adds.

    Args:
        rows: the training dataset.
        bos_id: the tokenizer's BOS token, if it has one.
        required: whether every row must begin with it.
        name_of: returns the text of a token id.
    """
    if bos_id is None:
        return Tick("BOS", "the tokenizer has none")
    ids, starts = rows.arrays["input_ids"], rows.arrays["starts"]
    first = ids[starts[:-1]] == bos_id
    second = (np.diff(starts) > 1) & (ids[np.minimum(starts[:-1] + 1, len(ids) - 1)] == bos_id)
    name = name_of(bos_id)
    doubled, missing = np.flatnonzero(first & second), np.flatnonzero(~first)
    repair = "begin the template with one BOS segment (not its text), or data.template=chatml"
    if len(doubled):
        found = f"{len(doubled)} rows begin with {name} twice (first: {rows.places[doubled[0]]})"
        return failed("BOS", Problem("data.template", found, f"one {name} at the beginning", repair))
    if wanted and len(missing):
        found = f"{len(missing)} rows begin without {name} (first: {rows.places[missing[0]]})"
        expected = f"one {name} at the beginning: the tokenizer adds it to every text"
        return failed("BOS", Problem("data.template", found, expected, repair))
    return Tick("BOS", f"{len(rows) - len(missing)} of {len(rows)} rows begin with one {name}, none with two")


def cut_is_told(*, rows: int, too_long: int, trained: int, lost: int, max_length: int) -> Tick:
    """Report the rows longer than ``max_length``, and the trained tokens lost to truncation.

    Args:
        num_rows: number of training rows.
        num_too_long: number of rows longer than ``max_length``, truncated or dropped.
        trained_tokens: number of trained tokens in the rows.
        lost_tokens: number of trained tokens lost.
        max_length: maximum tokens of a row.
    """
    if not too_long:
        return Tick("truncation", f"no row is longer than {max_length} tokens")
    share = lost / max(trained + lost, 1)
    detail = (
        f"{too_long} rows were longer than {max_length} tokens; {_percent(share)} of the trained tokens "
        f"({lost}) are lost"
    )
    much = share > MUCH_LOST or too_long > MUCH_LOST * (rows + too_long)
    return Tick("truncation", f"{detail}; {LONGER}" if much else detail, warned=much)


def _percent(share: float) -> str:
    """Format a share; never as 100% or 0% after rounding."""
    text = f"{share:.0%}"
    return f"{share:.2%}" if text in ("100%", "0%") and share not in (0.0, 1.0) else text
