"""Tokenize comparisons: prompt and completions from the template, truncation."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.preference.rows.comparisons import Comparison
from data_templates.segments import Message, TemplateError
from finetune.data.lost_characters import LostCharacters
from finetune.data.mapped_cache import Arrays
from finetune.data.pipeline import EncodedIndex
from finetune.data.report import DataReport
from finetune.data.row_store import Rows, as_array
from finetune.data.tokens import CHUNK_SIZE, Encoded, Encoder

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


def encode_comparisons(
    rows: Rows[Comparison], encoder: Encoder, limits: LengthLimits, index: EncodedIndex, report: DataReport
) -> Arrays:
    """Return the arrays of ``PreferenceGroups``; ``index`` receives the rows that are used."""
    flat, offsets, prompt_index = array("i"), array("q", [0]), array("q", [0])
    scores, ranks, margins = array("d"), array("i"), array("d")
    lost_characters = LostCharacters(encoder.tokenizer)
    for start in range(0, len(rows), CHUNK_SIZE):
        chunk = list(rows[start : start + CHUNK_SIZE])
        lost_characters.add(((row.location, [*row.prompt, *row.replies]) for row in chunk), report)
        for row_id, (row, encoded) in enumerate(zip(chunk, _encode_rows(chunk, encoder), strict=True), start):
            prompt_and_completions = _split_prompt_completions(encoded, encoder, row.location, report)
            truncated = prompt_and_completions and _truncate_row(
                *prompt_and_completions, row, limits, encoder, report
            )
            if not truncated:
                continue
            prompt, completions = truncated
            for ids in (prompt, *completions.values()):
                flat.extend(ids)
                offsets.append(len(flat))
            prompt_index.append(len(offsets) - 1)
            # Ranks are renumbered without the dropped completions; `index` lets ties share one.
            kept_ranks = [row.ranks[completion] for completion in completions]
            scores.extend(row.scores[completion] for completion in completions)
            ranks.extend(kept_ranks.index(rank) for rank in kept_ranks)
            margins.append(row.margin)
            index.add(row_id, row.location, row.source)
    report.notes += lost_characters.notes()
    return {
        "input_ids": as_array(flat, np.int32),
        "offsets": as_array(offsets, np.int64),
        "prompt_index": as_array(prompt_index, np.int64),
        "scores": as_array(scores, np.float64),
        "ranks": as_array(ranks, np.int32),
        "margins": as_array(margins, np.float64),
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
