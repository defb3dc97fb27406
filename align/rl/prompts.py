"""RL prompts: read, select, split off held-out prompts, tokenize, cache, report."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np

import align.preference.rows
from align.rl.prompt_rows import PromptRows, PromptTurns, RawPrompt
from align.rl.settings import PromptSettings
from data_templates.segments import Message, TemplateError
from finetune.data.conversation import Conversation, with_control_suffix
from finetune.data.lost_characters import LostCharacters
from finetune.data.mapped_cache import Arrays
from finetune.data.pipeline import MAX_TRAIN_SAMPLES, EncodedIndex, EncodedRows, prepare, probe_rows
from finetune.data.report import DataReport
from finetune.data.row_columns import RowColumns
from finetune.data.row_store import Rows, as_array
from finetune.data.tokens import CHUNK_SIZE, Encoded, Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.limits import AtMost
from finetune.training.context import RunContext
from finetune.training.model import TextEncoding

MIN_PROMPT_TOKENS = 8
"""Minimum number of positions for a prompt."""

TEMPLATE_MISMATCH = "dropped: not valid for this template"
ESCAPED_IN_PROMPTS = "contain template markers in their text (escaped)"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt.

    Attributes:
        messages: turns up to and including the last user turn, complete even if ``ids`` are truncated.
        ids: token ids up to the position where the completion starts.
        location: location of the row, ``file:line``.
        expected: the row's own reply (reference answer), if it has one.
        source_index: index of the source.
    """

    messages: PromptTurns
    ids: tuple[int, ...]
    location: str
    expected: str | None
    source_index: int = 0


@dataclass(frozen=True)
class Prompts(Sequence[Prompt]):
    """Prompts in the order of their rows.

    Attributes:
        arrays: ``input_ids``, and the ``offsets`` of each prompt in them.
        rows: each prompt as a conversation that ends with the row's own reply, empty if it has none.
    """

    arrays: Arrays
    rows: Sequence[Conversation]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        # `range` resolves negative indices and raises IndexError.
        index = range(len(self))[index]
        row = self.rows[index]
        start, end = self.arrays["offsets"][index : index + 2]
        ids = tuple(self.arrays["input_ids"][start:end].tolist())
        *messages, reply = row.messages
        return Prompt(tuple(messages), ids, row.location, reply.content or None, row.source_index)

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each prompt."""
        lengths: list[int] = np.diff(self.arrays["offsets"]).tolist()
        return lengths

    @property
    def locations(self) -> list[str]:
        """Return the location of each prompt, ``file:line``."""
        return [row.location for row in self.rows]


@dataclass(frozen=True)
class PreparedPrompts:
    """Training prompts, held-out prompts, the data report, and the columns of the rows."""

    train: Prompts
    held_out: Prompts | None
    report: DataReport
    columns: RowColumns

    @property
    def probe_rows(self) -> list[list[int]]:
        """Return the token ids of a few training prompts."""
        return probe_rows(len(self.train), lambda row: self.train[row].ids)

    @property
    def prompts(self) -> list[Conversation]:
        """Return the conversations for samples and graders: held-out prompts, else some training prompts.

        Each row appears once, and ends with its own reply (empty if it has none).
        """
        rows = self.train.rows[:MAX_TRAIN_SAMPLES] if self.held_out is None else self.held_out.rows
        return list({row.location: row for row in rows}.values())


def load_prompts(
    ctx: RunContext, settings: PromptSettings, text: TextEncoding, *, max_new_tokens: int
) -> PreparedPrompts:
    """Read and tokenize a recipe's prompts, and log the data report.

    Args:
        ctx: the run context.
        settings: the recipe's data section.
        text: template and tokenizer.
        max_new_tokens: maximum number of completion tokens, reserved after every prompt.

    Raises:
        UserError: prompt and completion exceed the context length, or the data are invalid.
    """
    max_prompt_length = ctx.resolve_auto(
        "data.max_prompt_length", resolve_max_prompt_length(settings, text, max_new_tokens=max_new_tokens)
    )
    with ctx.timed("data"):
        seed = ctx.recipe.settings.train.seed
        data = prepare_prompts(settings, text.encoder, max_prompt_length=max_prompt_length, seed=seed)
    for line in data.report.lines():
        ctx.log(line)
    return data


def resolve_max_prompt_length(
    settings: PromptSettings, text: TextEncoding, *, max_new_tokens: int
) -> tuple[int, str]:
    """Return the maximum number of prompt tokens, and the reason for it.

    Raises:
        UserError: a prompt plus ``max_new_tokens`` completion tokens exceeds the model's context length.
    """
    requested, available = settings.max_prompt_length, text.context - max_new_tokens
    if available < MIN_PROMPT_TOKENS:
        actual = f"{max_new_tokens} of a context length of {text.context}"
        expected = f"at most {text.context - MIN_PROMPT_TOKENS}, to leave room for a prompt"
        raise UserError(Problem("sampling.max_new_tokens", actual, expected))
    if requested is None:
        # The context has room for the minimum (checked above), whatever the completion takes of max_length.
        return max(
            MIN_PROMPT_TOKENS, text.max_length - max_new_tokens
        ), f"{max_new_tokens} tokens are reserved for the completion"
    if requested > available and isinstance(requested, AtMost):
        reason = f"{requested} in the recipe; the context of {text.context} minus {max_new_tokens} tokens"
        return available, reason
    if requested > available:
        actual = f"{requested}, plus up to {max_new_tokens} completion tokens"
        expected = f"at most {available}: the context length is {text.context}"
        raise UserError(
            Problem("data.max_prompt_length", actual, expected, f"data.max_prompt_length={available}")
        )
    return requested, "as requested"


def prepare_prompts(
    settings: PromptSettings, encoder: Encoder, *, max_prompt_length: int, seed: int
) -> PreparedPrompts:
    """Read, split and tokenize the prompts of a data section.

    Args:
        settings: the recipe's data section.
        encoder: template and tokenizer.
        max_prompt_length: maximum number of prompt tokens.
        seed: of the held-out split and of mixture sampling.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or no prompt is left.
    """
    kind = TokenizedPrompts(encoder, max_prompt_length, drop=settings.overflow == "drop")
    data = prepare(kind, settings, seed=seed, report=partial(DataReport, prompts=True))
    train = Prompts(data.train.arrays, data.train.samples)
    held_out = None if data.held_out is None else Prompts(data.held_out.arrays, data.held_out.samples)
    _fill_report(data.train, data.report)
    locations = [data.train.locations, *([data.held_out.locations] if data.held_out is not None else [])]
    return PreparedPrompts(train, held_out, data.report, RowColumns(settings, locations))


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts as a kind of tokenized rows: encoded as ``chat`` does.

    Attributes:
        encoder: template and tokenizer.
        max_prompt_length: maximum number of prompt tokens.
        drop: drop longer prompts instead of truncating them.
    """

    encoder: Encoder
    max_prompt_length: int
    drop: bool = False
    rows: ClassVar[PromptRows] = PromptRows()

    def encode(self, rows: Rows[RawPrompt], index: EncodedIndex, report: DataReport) -> Arrays:
        """Return the ids of all prompts, and where each begins."""
        flat_ids, offsets = array("i"), array("q", [0])
        lost_characters = LostCharacters(self.encoder.tokenizer)
        for start in range(0, len(rows), CHUNK_SIZE):
            chunk = list(rows[start : start + CHUNK_SIZE])
            lost_characters.add(((row.location, row.prompt) for row in chunk), report)
            # A policy trained with control tokens (chain of hindsight) expects its suffix in every prompt.
            prompts = [with_control_suffix(row.prompt, self.encoder.control_suffix) for row in chunk]
            encoded_chunk = self.encoder.encode_many(prompts)
            for row_id, (row, encoded) in enumerate(zip(chunk, encoded_chunk, strict=True), start):
                ids = self._truncated_ids(row, encoded, report)
                if ids is not None:
                    flat_ids.extend(ids)
                    offsets.append(len(flat_ids))
                    index.add(row_id, row.location, row.source_index)
        report.notes += lost_characters.notes()
        return {"input_ids": as_array(flat_ids, np.int32), "offsets": as_array(offsets, np.int64)}

    def _truncated_ids(
        self, row: RawPrompt, encoded: Encoded | TemplateError, report: DataReport
    ) -> list[int] | None:
        """Return a prompt's ids, at most the maximum; None if it is dropped."""
        if isinstance(encoded, TemplateError):
            report.count(TEMPLATE_MISMATCH, f"{row.location}: {encoded}")
            return None
        ids, limit = encoded.input_ids, self.max_prompt_length
        if len(ids) > limit:
            verb = "dropped" if self.drop else "truncated"
            report.count(f"longer than {limit} tokens, {verb}", row.location)
            report.num_too_long += 1
            report.lost_tokens += len(ids) - (0 if self.drop else limit)
            if self.drop:
                return None
            # Truncate from the left, so that the user's last turn survives, and keep BOS.
            num_bos = int(ids[:1] == [self.encoder.tokenizer.bos_token_id])
            ids = ids[:num_bos] + ids[len(ids) - limit + num_bos :]
        if encoded.num_escaped:
            report.count(ESCAPED_IN_PROMPTS, row.location)
        return ids

    def samples(self, rows: Rows[RawPrompt], limit: int | None) -> Iterator[Conversation]:
        """Return all prompts: rewards and graders read them as texts."""
        for row in rows:
            reply = Message("assistant", row.expected or "")
            yield Conversation([*row.prompt, reply], row.location, row.source_index)

    def raise_if_empty(self, key: str, encoded: EncodedRows, report: DataReport) -> None:
        """Raise UserError if no prompt was tokenized."""
        if not len(encoded):
            purpose = "to measure on" if key == "data.held_out" else "to answer"
            actual = f"nothing {purpose}: {'; '.join(report.lines()[1:])}"
            remedy = "data.overflow=truncate" if report.num_too_long else "choose another data.template"
            raise UserError(Problem(key, actual, "prompts", f"check the rows above, or {remedy}"))

    def cache_key(self) -> list[Any]:
        """Return all that decides the tokens besides the data section."""
        return [self.encoder.fingerprint(), self.encoder.control_suffix, self.max_prompt_length, self.drop]

    def code(self) -> tuple[Path, ...]:
        """Return this folder, and that of the split by prompt."""
        return (Path(__file__).parent, Path(align.preference.rows.__path__[0]))


def _fill_report(prompts: EncodedRows, report: DataReport) -> None:
    """Add row and token counts to the report, in total and per source."""
    lengths = np.diff(prompts.arrays["offsets"])
    report.rows, report.tokens, report.longest = len(prompts), int(lengths.sum()), int(lengths.max())
    for index, source in enumerate(report.sources):
        in_source = prompts.source_ids == index
        source.rows, source.tokens = int(in_source.sum()), int(lengths[in_source].sum())
