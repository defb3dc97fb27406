"""Tokenize comparisons: prompt and completions from the template, truncation, cache."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.preference.rows.dataset import PreferenceGroups
from align.preference.rows.judged import Comparison
from data_templates._segments import Message, TemplateError
from finetune.data.dataset import cached
from finetune.data.report import DataReport
from finetune.data.tokens import Encoded, Encoder

FORMAT = 1
"""Increased when the meaning of a cached file changes, so that old files are not read."""

NO_TEMPLATE = "dropped: the template cannot render the conversation"
WRITTEN_APART = "contain template markers in their text (escaped)"
ONLY_AN_END = "dropped: a completion has only its EOS token"


@dataclass(frozen=True, slots=True)
class Room:
    """The tokens that a prompt with one completion may have, and that a prompt keeps at least."""

    max_length: int
    max_prompt_length: int
    drop: bool = False


Ids = list[int]


def fit(prompt: Ids, completions: Sequence[Ids], room: Room, *, head: int = 0) -> tuple[Ids, list[Ids]]:
    """Truncate a prompt on the left and completions on the right, no more than needed.

    The prompt is truncated first, down to ``max_prompt_length``, then the completions.

    Args:
        prompt: P ids.
        completions: K lists of ids.
        limits: the maximum lengths.
        num_kept_start: number of ids to keep at the start of the prompt (BOS).

    >>> truncate_to([1, 2, 3, 4], [[5, 6, 7], [8]], LengthLimits(max_length=5, max_prompt_length=3))
    ([2, 3, 4], [[5, 6], [8]])
    """
    longest = max(map(len, completions))
    if len(prompt) + longest <= room.max_length:
        return prompt, list(completions)
    keeps = max(room.max_prompt_length, room.max_length - longest)
    if len(prompt) > keeps:
        prompt = prompt[:head] + prompt[len(prompt) - keeps + head :]
    return prompt, [ids[: room.max_length - len(prompt)] for ids in completions]


def tokenise(
    rows: Sequence[Comparison], encoder: Encoder, room: Room, *, cache: bool, report: DataReport
) -> PreferenceGroups:
    """Tokenize comparisons, or read them from the cache."""

    def encode(found: DataReport) -> dict[str, np.ndarray]:
        return _encode(rows, encoder, room, found)

    arrays = cached(_cache_key(rows, encoder, room), encode, cache=cache, report=report)
    kept = [rows[number] for number in arrays.pop("numbers")]
    places, sources = tuple(row.where for row in kept), tuple(row.source for row in kept)
    return PreferenceGroups(**arrays, places=places, sources=sources)


def _encode(
    rows: Sequence[Comparison], encoder: Encoder, room: Room, report: DataReport
) -> dict[str, np.ndarray]:
    flat: list[int] = []
    starts, firsts, numbers = [0], [0], []
    scores: list[float] = []
    ranks: list[int] = []
    for number, (row, encoded) in enumerate(zip(rows, _by_row(rows, encoder), strict=True)):
        parts = _parts(encoded, encoder, row.where, report)
        fitted = parts and _fitted(*parts, row, room, encoder, report)
        if not fitted:
            continue
        prompt, completions = fitted
        for ids in (prompt, *completions.values()):
            flat += ids
            starts.append(len(flat))
        firsts.append(len(starts) - 1)
        # Ranks are renumbered without the dropped completions; `index` lets ties share one.
        kept = [row.ranks[index] for index in completions]
        scores += [row.scores[index] for index in completions]
        ranks += [kept.index(rank) for rank in kept]
        numbers.append(number)
    return {
        "input_ids": np.asarray(flat, dtype=np.int32),
        "starts": np.asarray(starts, dtype=np.int64),
        "firsts": np.asarray(firsts, dtype=np.int64),
        "scores": np.asarray(scores, dtype=np.float64),
        "ranks": np.asarray(ranks, dtype=np.int32),
        "margins": np.asarray([rows[number].margin for number in numbers], dtype=np.float64),
        "numbers": np.asarray(numbers, dtype=np.int64),
    }


def _by_row(rows: Sequence[Comparison], encoder: Encoder) -> Iterator[list[Encoded | TemplateError]]:
    """Yield each row's conversations, one per completion, with loss on the completion only."""
    conversations: list[list[Message]] = []
    for row in rows:
        prompt = [replace(turn, trained=False) for turn in row.prompt]
        conversations += [[*prompt, replace(reply, trained=True)] for reply in row.replies]
    encoded = iter(encoder.encode_many(conversations))
    for row in rows:
        yield [next(encoded) for _ in row.replies]


def _parts(
    encoded: Sequence[Encoded | TemplateError], encoder: Encoder, where: str, report: DataReport
) -> tuple[Ids, list[Ids]] | None:
    """Return the ids of the prompt and of each completion up to its last trained token, None if unusable."""
    prompts, completions = [], []
    for one in encoded:
        if isinstance(one, TemplateError):
            report.count(NO_TEMPLATE, f"{where}: {one}")
            return None
        # The loss mask marks the completion: what comes before it is the prompt, what follows is dropped.
        start, end = one.trained.index(True), len(one.trained) - one.trained[::-1].index(True)
        if not all(one.trained[start:end]):
            report.count(NO_TEMPLATE, f"{where}: the completion is not contiguous")
            return None
        prompts.append(one.input_ids[:start])
        completions.append(one.input_ids[start:end])
    # Shared prompts need the same prompt tokens for every completion.
    if any(prompt != prompts[0] for prompt in prompts):
        report.count(NO_TEMPLATE, f"{where}: the prompt's tokens depend on the completion")
        return None
    if any(set(ids) <= set(encoder.stop_ids) for ids in completions):
        report.count(ONLY_AN_END, where)
        return None
    if any(one.written_apart for one in encoded if isinstance(one, Encoded)):
        report.count(WRITTEN_APART, where)
    return prompts[0], completions


def _fitted(
    prompt: Ids, completions: list[Ids], row: Comparison, room: Room, encoder: Encoder, report: DataReport
) -> tuple[Ids, dict[int, Ids]] | None:
    """Return the truncated prompt and completions (by index in the row), None if too few are distinct."""
    # BOS stays first when the prompt is truncated on the left.
    head = int(prompt[:1] == [encoder.tokenizer.bos_token_id])
    shorter, cut = fit(prompt, completions, room, head=head)
    lost = sum(map(len, completions)) - sum(map(len, cut))
    longer = f"longer than {room.max_length} tokens"
    report.too_long += len(shorter) < len(prompt) or lost > 0
    if room.drop and (len(shorter) < len(prompt) or lost):
        report.count(f"{longer}, dropped", row.where)
        report.lost_tokens += sum(map(len, completions))
        return None
    report.lost_tokens += lost
    if len(shorter) < len(prompt):
        report.count(f"{longer}, prompt truncated on the left", row.where)
    if lost:
        report.count(f"{longer}, completion truncated", row.where)
    # Completions that differed may be identical after truncation.
    kept = _distinct(cut, row, " after truncation" * (lost > 0), report)
    return (shorter, kept) if kept else None


def _distinct(cut: list[Ids], row: Comparison, when: str, report: DataReport) -> dict[int, Ids]:
    """Return the completions with distinct tokens, by index in the row; empty if too few are."""
    first: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(cut):
        first.setdefault(tuple(ids), index)
    kept = {index: cut[index] for index in first.values()}
    if len(kept) == len(cut):
        return kept
    if len(kept) < 2:
        report.count(f"dropped: completions with identical tokens{when}", row.where)
        return {}
    report.count(f"with some completions of identical tokens{when}", row.where)
    if len({row.ranks[index] for index in kept}) < 2:
        report.count(f"dropped: only tied completions are distinct{when}", row.where)
        return {}
    return kept


def _cache_key(rows: Sequence[Comparison], encoder: Encoder, room: Room) -> str:
    head = ["preferences", FORMAT, encoder.fingerprint(), room.max_length, room.max_prompt_length, room.drop]
    digest = hashlib.sha256(json.dumps(head).encode())
    for row in rows:
        turns = [[turn.role, turn.content, turn.context] for turn in (*row.prompt, *row.replies)]
        judged = [row.scores, row.ranks, row.margin]
        digest.update(json.dumps([row.where, len(row.replies), turns, judged], ensure_ascii=False).encode())
    return digest.hexdigest()
