"""RL prompts: read, select, split off held-out prompts, tokenize, cache, report."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.preference.rows.prepare import split_by_prompt
from align.rl.prompt_layouts import PROMPT_LAYOUTS
from align.rl.settings import PromptSettings
from data_templates.segments import REPLY_ROLES, Message, TemplateError
from finetune.data.conversation import Conversation, with_control_suffix
from finetune.data.dataset import MAX_TRAIN_PROMPTS, load_or_encode
from finetune.data.layouts import match_layout, parse_rows
from finetune.data.load import (
    SELECT_STREAM,
    SourceSpec,
    count_duplicates,
    count_leaked,
    read_ratings,
    read_rows_of,
    source_specs,
)
from finetune.data.mixture import MixtureComponent, mix_components
from finetune.data.report import DataReport, SourceReport
from finetune.data.selection import select_rows
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.training.context import RunContext
from finetune.training.model import TextEncoding

PROMPT_CACHE_FORMAT = 3
"""Cache format version. Increment it when the content of a cached file changes, so old files are ignored."""
MIN_PROMPT_TOKENS = 8
"""Minimum number of positions for a prompt."""

NAME_PROMPT_COLUMN = "name the column of the prompt: 'data.columns={prompt: QUESTION_COLUMN}'"
NO_USER_TURN = "dropped: the prompt does not end with a user turn"
EMPTY_PROMPT_TURN = "dropped: empty turn in the prompt"
TEMPLATE_MISMATCH = "dropped: not valid for this template"
ESCAPED_IN_PROMPTS = "contain template markers in their text (escaped)"

PromptTurns = tuple[Message, ...]


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
class Prompts:
    """Prompts in the order of their rows."""

    rows: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        return self.rows[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each prompt."""
        return [len(row.ids) for row in self.rows]

    @property
    def locations(self) -> list[str]:
        """Return the location of each prompt, ``file:line``."""
        return [row.location for row in self.rows]


@dataclass(frozen=True)
class PreparedPrompts:
    """Training prompts, held-out prompts and the data report."""

    train: Prompts
    held_out: Prompts | None
    report: DataReport

    @property
    def prompts(self) -> list[Conversation]:
        """Return the conversations for samples and graders: held-out prompts, else some training prompts.

        Each row appears once, and ends with its own reply (empty if it has none).
        """
        rows = self.train.rows[:MAX_TRAIN_PROMPTS] if self.held_out is None else self.held_out.rows
        unique = {row.location: row for row in rows}.values()
        return [
            Conversation(
                [*row.messages, Message("assistant", row.expected or "")], row.location, row.source_index
            )
            for row in unique
        ]


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A row before tokenization: the turns up to the completion, and the row's own reply if it has one."""

    prompt: PromptTurns
    expected: str | None
    location: str
    source_index: int

    @property
    def text_key(self) -> object:
        """Return the key by which duplicate prompts are found: role and texts of each turn."""
        return tuple(turn.key for turn in self.prompt)


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
    report, held_out_report = DataReport(prompts=True), DataReport(prompts=True)
    rows, held_out_rows = _load_prompts(settings, seed, report, held_out_report)
    train = _tokenize(rows, encoder, settings, max_prompt_length, report)
    _raise_if_empty("data.source", "to answer", train, report)
    held_out = None
    if settings.held_out:
        held_out = _tokenize(held_out_rows, encoder, settings, max_prompt_length, held_out_report)
        _raise_if_empty("data.held_out", "to measure on", held_out, held_out_report)
        report.held_out = len(held_out)
    report.counts |= {f"held out: {message}": count for message, count in held_out_report.counts.items()}
    report.examples |= {
        f"held out: {message}": location for message, location in held_out_report.examples.items()
    }
    _fill_report(train, report)
    return PreparedPrompts(train, held_out, report)


def _load_prompts(
    settings: PromptSettings, seed: int, report: DataReport, held_out_report: DataReport
) -> tuple[list[RawPrompt], list[RawPrompt]]:
    """Return training and held-out prompts; the reports count dropped rows."""
    specs = enumerate(source_specs(settings))
    components = [_load_source(spec, index, seed, report) for index, spec in specs]
    report.sources = [component.report for component in components]
    report.layout = " + ".join(dict.fromkeys(source.layout for source in report.sources))
    # By prompt, not by row: copies of a prompt would leak into the held-out split.
    if settings.mix is None:
        train, held_out = split_by_prompt(components[0].rows, settings.held_out, seed)
    else:
        train, held_out = mix_components(components, settings, seed=seed, report=report)
    if isinstance(settings.held_out, str):
        spec = SourceSpec("data.held_out", settings.held_out, settings.split, None, settings.columns)
        held_out = _load_source(spec, 0, seed, held_out_report).rows
    count_duplicates([row for component in components for row in component.rows], report)
    count_leaked(held_out, train, held_out_report)
    return train, held_out


def _load_source(spec: SourceSpec, index: int, seed: int, report: DataReport) -> MixtureComponent[RawPrompt]:
    """Return the prompts of a source.

    Raises:
        UserError: the source cannot be read, its rows match no layout, or no row has a prompt.
    """
    source_rows = read_rows_of(spec, index, seed)
    layout = match_layout(
        list(source_rows[0].columns),
        PROMPT_LAYOUTS,
        columns=spec.columns,
        where=spec.name,
        repair=NAME_PROMPT_COLUMN,
    )
    conversations = parse_rows(source_rows, layout, spec.columns)
    score_column = spec.select.score if spec.select else None
    scores = (
        [0.0] * len(source_rows)
        if score_column is None
        else read_ratings(source_rows, score_column, where=f"{spec.key}.select.score")
    )
    rows = [
        Conversation(messages, row.location, index, score)
        for messages, row, score in zip(conversations, source_rows, scores, strict=True)
    ]
    if spec.select is not None:
        rng = np.random.default_rng([seed, index, SELECT_STREAM])
        rows = select_rows(rows, spec.select, rng=rng, report=report)
    prompts = _split_prompts(rows, report)
    if not prompts:
        actual = f"nothing to answer: {'; '.join(report.lines()[1:])}"
        repair = f"check the rows above, or {'select more rows' if spec.select else NAME_PROMPT_COLUMN}"
        raise UserError(Problem(spec.key, actual, "rows with a user turn", repair))
    return MixtureComponent(
        SourceReport(spec.name, layout.name, num_read=len(source_rows), num_usable=len(prompts)), prompts
    )


def _split_prompts(rows: Sequence[Conversation], report: DataReport) -> list[RawPrompt]:
    """Split rows into prompt and final reply; rows without a prompt are dropped and counted."""
    prompts = []
    for row in rows:
        messages, expected = list(row.messages), None
        while messages and messages[-1].role in REPLY_ROLES:
            expected = messages.pop().full_text
        # "observation" is a tool's result, which the policy answers as it does a user.
        if not messages or messages[-1].role not in ("user", "observation"):
            report.count(NO_USER_TURN, row.location)
        elif any(turn.is_empty for turn in messages):
            report.count(EMPTY_PROMPT_TURN, row.location)
        else:
            prompts.append(RawPrompt(tuple(messages), expected or None, row.location, row.source_index))
    return prompts


def _tokenize(
    rows: Sequence[RawPrompt],
    encoder: Encoder,
    settings: PromptSettings,
    max_prompt_length: int,
    report: DataReport,
) -> Prompts:
    """Tokenize prompts as ``chat`` does, or load them from the cache."""
    drop = settings.overflow == "drop"

    def encode(encode_report: DataReport) -> dict[str, np.ndarray]:
        return _encode_prompts(rows, encoder, max_prompt_length, drop, encode_report)

    cache_key = _prompt_cache_key(rows, encoder, max_prompt_length, drop)
    arrays = load_or_encode(cache_key, encode, cache=settings.cache, report=report)
    # np.split returns one (empty) piece even without prompts, hence strict=False below.
    prompt_ids = np.split(arrays["input_ids"], arrays["offsets"][1:-1])
    kept_rows = [rows[row_id] for row_id in arrays["row_ids"]]
    return Prompts(
        tuple(
            Prompt(row.prompt, tuple(token_ids.tolist()), row.location, row.expected, row.source_index)
            for row, token_ids in zip(kept_rows, prompt_ids, strict=False)
        )
    )


def _encode_prompts(
    rows: Sequence[RawPrompt], encoder: Encoder, max_prompt_length: int, drop: bool, report: DataReport
) -> dict[str, np.ndarray]:
    flat_ids: list[int] = []
    offsets, row_ids = [0], []
    # A policy trained with control tokens (chain of hindsight) expects its suffix in every prompt.
    conversations = [with_control_suffix(row.prompt, encoder.control_suffix) for row in rows]
    for row_id, encoded in enumerate(encoder.encode_many(conversations)):
        location = rows[row_id].location
        if isinstance(encoded, TemplateError):
            report.count(TEMPLATE_MISMATCH, f"{location}: {encoded}")
            continue
        ids = encoded.input_ids
        if len(ids) > max_prompt_length:
            report.count(
                f"longer than {max_prompt_length} tokens, {'dropped' if drop else 'truncated'}", location
            )
            report.num_too_long += 1
            report.lost_tokens += len(ids) - (0 if drop else max_prompt_length)
            if drop:
                continue
            # Truncate from the left, so that the user's last turn survives, and keep BOS.
            num_bos = int(ids[:1] == [encoder.tokenizer.bos_token_id])
            ids = ids[:num_bos] + ids[len(ids) - max_prompt_length + num_bos :]
        if encoded.num_escaped:
            report.count(ESCAPED_IN_PROMPTS, location)
        flat_ids += ids
        offsets.append(len(flat_ids))
        row_ids.append(row_id)
    return {
        "input_ids": np.asarray(flat_ids, dtype=np.int32),
        "offsets": np.asarray(offsets, dtype=np.int64),
        "row_ids": np.asarray(row_ids, dtype=np.int64),
    }


def _prompt_cache_key(rows: Sequence[RawPrompt], encoder: Encoder, max_prompt_length: int, drop: bool) -> str:
    head = [
        "prompts",
        PROMPT_CACHE_FORMAT,
        encoder.fingerprint(),
        encoder.control_suffix,
        max_prompt_length,
        drop,
    ]
    # Everything that determines the token ids, so that a change of it gives another file.
    digest = hashlib.sha256(json.dumps(head).encode())
    # The location too: the report that is cached with the ids names rows.
    for row in rows:
        digest.update(json.dumps([row.location, row.text_key], ensure_ascii=False).encode())
    return digest.hexdigest()


def _raise_if_empty(key: str, purpose: str, prompts: Prompts, report: DataReport) -> None:
    if not len(prompts):
        actual = f"nothing {purpose}: {'; '.join(report.lines()[1:])}"
        remedy = "data.overflow=truncate" if report.num_too_long else "choose another data.template"
        raise UserError(Problem(key, actual, "prompts", f"check the rows above, or {remedy}"))


def _fill_report(prompts: Prompts, report: DataReport) -> None:
    """Add row and token counts to the report, in total and per source."""
    lengths, sources = np.asarray(prompts.lengths), np.asarray([row.source_index for row in prompts])
    report.rows, report.tokens, report.longest = len(prompts), int(lengths.sum()), int(lengths.max())
    for index, source in enumerate(report.sources):
        source.rows, source.tokens = int((sources == index).sum()), int(lengths[sources == index].sum())
