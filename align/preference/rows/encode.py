"""Tokenize comparisons: prompt and completions from the template, truncation, cache."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.preference.rows.comparisons import Comparison
from align.preference.rows.dataset import PreferenceGroups
from data_templates.segments import Message, TemplateError
from finetune.data.dataset import load_or_encode
from finetune.data.report import DataReport
from finetune.data.tokens import Encoded, Encoder

PREFERENCE_CACHE_FORMAT = 4
"""Increased when the meaning of a cached file changes, so that old files are not read."""

DROPPED_UNRENDERABLE = "dropped: the template cannot render the conversation"
ESCAPED_MARKERS = "contain template markers in their text (escaped)"
DROPPED_ONLY_EOS = "dropped: a completion has only its EOS token"


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """The tokens that a prompt with one completion may have, and that a prompt keeps at least."""

    max_length: int
    max_prompt_length: int
    drop: bool = False


IdList = list[int]


def truncate_to(
    prompt: IdList, completions: Sequence[IdList], limits: LengthLimits, *, num_kept_start: int = 0
) -> tuple[IdList, list[IdList]]:
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
    if len(prompt) + longest <= limits.max_length:
        return prompt, list(completions)
    prompt_length = max(limits.max_prompt_length, limits.max_length - longest)
    if len(prompt) > prompt_length:
        prompt = prompt[:num_kept_start] + prompt[len(prompt) - prompt_length + num_kept_start :]
    return prompt, [ids[: limits.max_length - len(prompt)] for ids in completions]


def tokenize_comparisons(
    rows: Sequence[Comparison], encoder: Encoder, limits: LengthLimits, *, cache: bool, report: DataReport
) -> PreferenceGroups:
    """Tokenize comparisons, or read them from the cache."""

    def encode(encode_report: DataReport) -> dict[str, np.ndarray]:
        return _encode_comparisons(rows, encoder, limits, encode_report)

    arrays = load_or_encode(_preference_cache_key(rows, encoder, limits), encode, cache=cache, report=report)
    tokenized = [rows[row_id] for row_id in arrays.pop("row_ids")]
    locations, source_ids = (
        tuple(row.location for row in tokenized),
        tuple(row.source for row in tokenized),
    )
    return PreferenceGroups(**arrays, locations=locations, source_ids=source_ids)


def _encode_comparisons(
    rows: Sequence[Comparison], encoder: Encoder, limits: LengthLimits, report: DataReport
) -> dict[str, np.ndarray]:
    flat: list[int] = []
    offsets, prompt_index, row_ids = [0], [0], []
    scores: list[float] = []
    ranks: list[int] = []
    for row_id, (row, encoded) in enumerate(zip(rows, _encode_rows(rows, encoder), strict=True)):
        prompt_and_completions = _split_prompt_completions(encoded, encoder, row.location, report)
        truncated = prompt_and_completions and _truncate_row(
            *prompt_and_completions, row, limits, encoder, report
        )
        if not truncated:
            continue
        prompt, completions = truncated
        for ids in (prompt, *completions.values()):
            flat += ids
            offsets.append(len(flat))
        prompt_index.append(len(offsets) - 1)
        # Ranks are renumbered without the dropped completions; `index` lets ties share one.
        kept_ranks = [row.ranks[index] for index in completions]
        scores += [row.scores[index] for index in completions]
        ranks += [kept_ranks.index(rank) for rank in kept_ranks]
        row_ids.append(row_id)
    return {
        "input_ids": np.asarray(flat, dtype=np.int32),
        "offsets": np.asarray(offsets, dtype=np.int64),
        "prompt_index": np.asarray(prompt_index, dtype=np.int64),
        "scores": np.asarray(scores, dtype=np.float64),
        "ranks": np.asarray(ranks, dtype=np.int32),
        "margins": np.asarray([rows[row_id].margin for row_id in row_ids], dtype=np.float64),
        "row_ids": np.asarray(row_ids, dtype=np.int64),
    }


def _encode_rows(rows: Sequence[Comparison], encoder: Encoder) -> Iterator[list[Encoded | TemplateError]]:
    """Yield each row's conversations, one per completion, with loss on the completion only."""
    conversations: list[list[Message]] = []
    for row in rows:
        prompt = [replace(turn, trained=False) for turn in row.prompt]
        conversations += [[*prompt, replace(reply, trained=True)] for reply in row.replies]
    encoded = iter(encoder.encode_many(conversations))
    for row in rows:
        yield [next(encoded) for _ in row.replies]


def _split_prompt_completions(
    encoded: Sequence[Encoded | TemplateError], encoder: Encoder, location: str, report: DataReport
) -> tuple[IdList, list[IdList]] | None:
    """Return the ids of the prompt and of each completion up to its last trained token, None if unusable."""
    prompts, completions = [], []
    for conversation in encoded:
        if isinstance(conversation, TemplateError):
            report.count(DROPPED_UNRENDERABLE, f"{location}: {conversation}")
            return None
        # The loss mask marks the completion: what comes before it is the prompt, what follows is dropped.
        start, end = (
            conversation.loss_mask.index(True),
            len(conversation.loss_mask) - conversation.loss_mask[::-1].index(True),
        )
        if not all(conversation.loss_mask[start:end]):
            report.count(DROPPED_UNRENDERABLE, f"{location}: the completion is not contiguous")
            return None
        prompts.append(conversation.input_ids[:start])
        completions.append(conversation.input_ids[start:end])
    # Shared prompts need the same prompt tokens for every completion.
    if any(prompt != prompts[0] for prompt in prompts):
        report.count(DROPPED_UNRENDERABLE, f"{location}: the prompt's tokens depend on the completion")
        return None
    # Such a completion has no text that a loss could prefer or reject.
    if any(set(ids) <= set(encoder.stop_ids) for ids in completions):
        report.count(DROPPED_ONLY_EOS, location)
        return None
    if any(conversation.num_escaped for conversation in encoded if isinstance(conversation, Encoded)):
        report.count(ESCAPED_MARKERS, location)
    return prompts[0], completions


def _truncate_row(
    prompt: IdList,
    completions: list[IdList],
    row: Comparison,
    limits: LengthLimits,
    encoder: Encoder,
    report: DataReport,
) -> tuple[IdList, dict[int, IdList]] | None:
    """Return the truncated prompt and completions (by index in the row), None if too few are distinct."""
    # BOS stays first when the prompt is truncated on the left.
    num_kept_start = int(prompt[:1] == [encoder.tokenizer.bos_token_id])
    truncated_prompt, truncated = truncate_to(prompt, completions, limits, num_kept_start=num_kept_start)
    num_lost = sum(map(len, completions)) - sum(map(len, truncated))
    too_long = f"longer than {limits.max_length} tokens"
    report.num_too_long += len(truncated_prompt) < len(prompt) or num_lost > 0
    if limits.drop and (len(truncated_prompt) < len(prompt) or num_lost):
        report.count(f"{too_long}, dropped", row.location)
        report.lost_tokens += sum(map(len, completions))
        return None
    report.lost_tokens += num_lost
    if len(truncated_prompt) < len(prompt):
        report.count(f"{too_long}, prompt truncated on the left", row.location)
    if num_lost:
        report.count(f"{too_long}, completion truncated", row.location)
    # Completions that differed may be identical after truncation.
    distinct = _distinct_token_sequences(truncated, row, " after truncation" * (num_lost > 0), report)
    return (truncated_prompt, distinct) if distinct else None


def _distinct_token_sequences(
    completions: list[IdList], row: Comparison, suffix: str, report: DataReport
) -> dict[int, IdList]:
    """Return the completions with distinct tokens, by index in the row; empty if too few are."""
    first: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(completions):
        first.setdefault(tuple(ids), index)
    distinct = {index: completions[index] for index in first.values()}
    if len(distinct) == len(completions):
        return distinct
    if len(distinct) < 2:
        report.count(f"dropped: completions with identical tokens{suffix}", row.location)
        return {}
    report.count(f"with some completions of identical tokens{suffix}", row.location)
    if len({row.ranks[index] for index in distinct}) < 2:
        report.count(f"dropped: only tied completions are distinct{suffix}", row.location)
        return {}
    return distinct


def _preference_cache_key(rows: Sequence[Comparison], encoder: Encoder, limits: LengthLimits) -> str:
    head = [
        "preferences",
        PREFERENCE_CACHE_FORMAT,
        encoder.fingerprint(),
        limits.max_length,
        limits.max_prompt_length,
        limits.drop,
    ]
    digest = hashlib.sha256(json.dumps(head).encode())
    for row in rows:
        turns = [turn.key for turn in (*row.prompt, *row.replies)]
        annotation = [row.scores, row.ranks, row.margin]
        # With the location: the report is cached too, and names it.
        digest.update(
            json.dumps([row.location, len(row.replies), turns, annotation], ensure_ascii=False).encode()
        )
    return digest.hexdigest()
