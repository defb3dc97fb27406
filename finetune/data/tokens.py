"""Encoder: messages to token ids and loss mask, for training rows, prompts, samples and chat alike."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import data_templates
from data_templates import tokenizer as tokenizer_template
from data_templates.markers import Markers
from data_templates.segments import (
    DOCUMENT_START,
    Message,
    Segment,
    Template,
    TemplateError,
    lift_thought,
    map_texts,
    markup,
    render,
    render_document,
)
from finetune.data.conversation import with_control_suffix
from finetune.data.tokenizer_probes import (
    NORMALIZATIONS,
    bos_id,
    convert_to_ids,
    find_anchors,
    special_tokens,
    tokenize_batch,
    tokenizer_state,
    tokenizes_equally,
)
from finetune.recipe.discovery import load_plugin
from finetune.recipe.errors import Problem, UserError

CHUNK_SIZE = 2048
"""Conversations per tokenizer call: enough to use every core, few enough to need little memory."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and loss mask of a conversation, both of length T.

    ``num_escaped``: markers in its text. ``num_left_out``: thoughts and texts of earlier replies that the
    template does not repeat.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    num_escaped: int = 0
    num_left_out: int = 0


@dataclass(frozen=True, slots=True)
class _RenderedRow:
    """A conversation before it is tokenized."""

    spans: list["_TokenSpan"]
    num_escaped: int
    num_left_out: int


@dataclass(frozen=True, slots=True)
class _TokenSpan:
    """A span of adjacent segments that is tokenized in one piece: given ``ids`` (BOS, EOS), or ``text``.

    ``preceding`` is the special token that precedes the text, "" at the start of a sequence, None after text.
    """

    trained: bool
    ids: list[int]
    text: str = ""
    preceding: str | None = None


class Encoder:
    """Encodes conversations to token ids with one template and one tokenizer.

    Prompt and reply are tokenized separately, so that a prompt has the same tokens whether a reply follows
    (training) or not (generation), and no token spans the boundary. ``system`` is prepended to conversations
    without a system turn; ``control_suffix`` is appended to generation prompts, never to training rows.
    ``template_options`` are variables of the tokenizer's chat template. ``reasoning``: thoughts of replies
    are rendered (``keep``), removed (``strip``) or rendered without loss (``mask``).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        *,
        system: str | None = None,
        control_suffix: str = "",
        template_options: Mapping[str, Any] | None = None,
        reasoning: str = "keep",
    ) -> None:
        """Raise UserError if the tokenizer has no EOS, or lacks the chat template that is to be used."""
        self.tokenizer = tokenizer
        self.name = template
        self.system = system
        self.control_suffix = control_suffix
        self.template_options = dict(template_options or {})
        self.reasoning = reasoning
        if tokenizer.eos_token_id is None:
            actual = "the tokenizer has no EOS token"
            raise UserError(Problem("model.base", actual, "a tokenizer with an EOS token, to end replies"))
        self.special_tokens = special_tokens(tokenizer)
        # Tokens that the tokenizer matches as a unit, before it splits a text.
        self._token_ids = {**tokenizer.get_added_vocab(), **convert_to_ids(tokenizer, self.special_tokens)}
        self.template = self._load_template(template)
        stop_ids = [self._token_ids[token] for token in self.template.stop if token in self._token_ids]
        self.stop_ids = sorted({int(tokenizer.eos_token_id), *stop_ids})
        self._bos = bos_id(tokenizer)
        self._anchors = find_anchors(tokenizer)
        self._normalizers = [
            normalize
            for normalize, probe in NORMALIZATIONS
            if tokenizes_equally(tokenizer, probe, normalize(probe))
        ]
        # Unknown characters become <unk> anywhere in a text, so <unk> is no sign of an injected token.
        injectable = [token for token in self.special_tokens if token != tokenizer.unk_token]
        self._injectable = Markers.of(injectable)
        self._special = Markers.of(self.special_tokens).pattern
        self._injectable_ids = frozenset(convert_to_ids(tokenizer, injectable).values())

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Encode one conversation.

        Raises:
            TemplateError: the template cannot render this conversation.
        """
        [encoded] = self.encode_many([messages])
        if isinstance(encoded, TemplateError):
            raise encoded
        return encoded

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | TemplateError]:
        """Encode many conversations; one that the template cannot render gets its TemplateError.

        Fast tokenizers parallelize one call over the cores; even on a single core it saves a sixth or more.
        """
        encoded: list[Encoded | TemplateError] = []
        for start in range(0, len(conversations), CHUNK_SIZE):
            encoded += self._encode_chunk(conversations[start : start + CHUNK_SIZE])
        return encoded

    def split_replies(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return one conversation for each trained reply where the template cannot train them in one row.

        Most templates render a reply alike whatever follows; then the conversation is returned as it is.
        """
        if messages[0] == DOCUMENT_START:
            return [list(messages)]
        return self.template.split(self._prepare(messages))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a generation prompt, up to the start of the reply."""
        return self.encode(with_control_suffix(messages, self.control_suffix)).input_ids

    def decode_reply(self, ids: Sequence[int]) -> str:
        """Decode a reply up to its first stop token and strip it."""
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))
        # Without clean-up, which deletes spaces before punctuation that the model generated.
        text = self.tokenizer.decode(
            list(ids[:end]),
            skip_special_tokens=not self.template.special_inside,
            clean_up_tokenization_spaces=False,
        )
        return self.strip_special_tokens(str(text)).strip()

    def strip_special_tokens(self, text: str) -> str:
        """Return a reply's text without special tokens, or without its end where they separate its parts."""
        if self.template.special_inside:
            return re.sub(rf"(?:{self._special.pattern})+\s*\Z", "", text)
        return self._special.sub("", text)

    def parse_reply(self, text: str) -> Message:
        """Return a generated reply as a turn with its thought and calls; text that is neither is content."""
        parsed = self.template.parse(text)
        return Message("assistant", parsed.content, reasoning=parsed.reasoning, tool_calls=parsed.tool_calls)

    def fingerprint(self) -> str:
        """Return a digest of everything that determines the token ids: tokenizer, template, system text."""
        # Source files too: an edited template must not read tokens that its earlier version has cached.
        folder = Path(data_templates.__path__[0])
        names = (*data_templates.SHARED, self.name)
        files = [*sorted(folder.glob("_*.py")), *(folder / f"{name}.py" for name in names)]
        parts = [tokenizer_state(self.tokenizer), self.tokenizer.chat_template, self.system]
        parts += [self.template_options, self.reasoning]
        parts += [file.read_text(encoding="utf-8") for file in files]
        parts += [self._bos, self.stop_ids, self.special_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _load_template(self, name: str) -> Template:
        if name != "tokenizer":
            template: Template = load_plugin("data_templates", name, where="data.template").TEMPLATE
            return template
        if not self.tokenizer.chat_template:
            actual = "the tokenizer of this base has no chat template"
            repair = "use data.template=chatml (or alpaca, vicuna, llama2)"
            raise UserError(
                Problem(
                    "data.template", f"'tokenizer', but {actual}", "a template of data_templates/", repair
                )
            )
        return tokenizer_template.bind_chat_template(
            self._apply_chat_template, special_tokens=self.special_tokens, added_tokens=list(self._token_ids)
        )

    def _apply_chat_template(
        self, messages: list[dict[str, Any]], opened: bool, tools: list[dict[str, Any]] | None = None
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=opened,
                **self.template_options,
            )
        except Exception as error:  # a Jinja template may raise anything; its text is what the user needs
            raise TemplateError(
                f"the tokenizer's chat template rejects this conversation: {error}"
            ) from error
        return str(text)

    def _encode_chunk(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | TemplateError]:
        # The spans of all conversations go through the tokenizer in one batch.
        rendered = [self._render(messages) for messages in conversations]
        span_lists = [[] if isinstance(row, TemplateError) else row.spans for row in rendered]
        texts = [span for spans in span_lists for span in spans if not span.ids]
        encoded = iter(self._encode_texts(texts))
        chunk: list[Encoded | TemplateError] = []
        for row, spans in zip(rendered, span_lists, strict=True):
            span_ids = [span.ids or next(encoded) for span in spans]
            chunk.append(row if isinstance(row, TemplateError) else self._concat_spans(row, span_ids))
        return chunk

    def _render(self, messages: Sequence[Message]) -> _RenderedRow | TemplateError:
        try:
            segments, num_escaped = self.segments(messages)
            num_left_out = self.template.num_left_out(self._prepare(messages))
        except TemplateError as error:
            return error
        return _RenderedRow(self._merge_segments(segments), num_escaped, num_left_out)

    def segments(self, messages: Sequence[Message]) -> tuple[list[Segment], int]:
        """Return a conversation's segments and the number of escaped markers in its text.

        Raises:
            TemplateError: the template cannot render this conversation.
        """
        prepared = [self._normalize(message) for message in self._prepare(messages)]
        segments, num_escaped = self._render_with(self.template, prepared)
        if self.reasoning == "mask":
            segments = _mask_thoughts(segments, prepared)
        return segments, num_escaped

    def whole_text(self, messages: Sequence[Message]) -> str:
        """Return a conversation's text, of the tokenizer's chat template as it renders it in one piece.

        Raises:
            TemplateError: the template cannot render this conversation.
        """
        template, render_whole = self.template, self.template.render_whole
        if render_whole is not None:
            template = replace(template, render=lambda turns: [markup(render_whole(turns))])
        prepared = [self._normalize(message) for message in self._prepare(messages)]
        segments, _ = self._render_with(template, prepared)
        bos = "" if self._bos is None else str(self.tokenizer.bos_token)
        texts = {"bos": lambda _: bos, "eos": self._end_token}
        return "".join(texts.get(piece.kind, str)(piece.text) for piece in segments)

    def _end_token(self, text: str) -> str:
        """Return the token that ends a turn: the template's, or EOS if the tokenizer lacks it."""
        return text if text in self._token_ids else str(self.tokenizer.eos_token)

    def _render_with(self, template: Template, messages: Sequence[Message]) -> tuple[list[Segment], int]:
        if messages and messages[0] == DOCUMENT_START:
            template = replace(template, render=render_document)
        return render(template, messages, special_tokens=self.special_tokens)

    def _prepare(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Prepend the recipe's system text, unless the data has a system turn; apply ``reasoning``."""
        if not messages or messages[0] == DOCUMENT_START:
            return messages
        if self.reasoning != "keep":
            messages = [lift_thought(message) for message in messages]
        if self.reasoning == "strip":
            messages = [replace(message, reasoning="") for message in messages]
        if not self.system or messages[0].role == "system":
            return messages
        return [Message("system", self.system), *messages]

    def _normalize(self, message: Message) -> Message:
        """Apply the tokenizer's own normalizations, so that markers it would see are found in the text."""
        for normalize in self._normalizers:
            message = map_texts(message, normalize)
        return message

    def _merge_segments(self, segments: Sequence[Segment]) -> list[_TokenSpan]:
        """Merge adjacent segments of equal kind, reply and trained flags into spans."""
        spans: list[_TokenSpan] = []
        # All segments of one reply have the same trained flag, so the flag never splits a reply's tokens.
        preceding: str | None = ""
        for (kind, _, trained), group in groupby(segments, key=lambda s: (_span_kind(s), s.reply, s.trained)):
            pieces = [piece.text for piece in group]
            if kind == "text":
                text = "".join(pieces)
                spans += [_TokenSpan(trained, [], text, preceding)] if text else []
                preceding = pieces[-1] if pieces[-1] in self._token_ids else None if text else preceding
            elif kind == "eos":
                end_tokens = [self._end_token(text) for text in pieces]
                spans.append(_TokenSpan(trained, [self._token_ids[end] for end in end_tokens]))
                preceding = end_tokens[-1]
            elif self._bos is not None:
                spans.append(_TokenSpan(trained, [self._bos] * len(pieces)))
                preceding = ""
        return spans

    def _encode_texts(self, spans: Sequence[_TokenSpan]) -> list[list[int] | TemplateError]:
        """Tokenize each span after a prefix with a known tokenization, and return the span's own tokens."""
        encoded: list[list[int] | TemplateError] = [
            TemplateError(f"the tokenizer merges {span.text[:20]!r} with any text before it")
            for span in spans
        ]
        prefixes_left = {index: self._prefixes(span) for index, span in enumerate(spans)}
        while prefixes_left:
            texts = [prefixes[0][0] + spans[index].text for index, prefixes in prefixes_left.items()]
            for (index, prefixes), ids in zip(
                list(prefixes_left.items()), tokenize_batch(self.tokenizer, texts), strict=True
            ):
                prefix_ids = prefixes[0][1]
                # The prefix has its own tokens again, so the rest are exactly the span's.
                if ids[: len(prefix_ids)] == prefix_ids:
                    encoded[index] = ids[len(prefix_ids) :]
                    prefixes_left.pop(index)
                else:
                    prefixes_left[index] = prefixes[1:]
            prefixes_left = {index: prefixes for index, prefixes in prefixes_left.items() if prefixes}
        return encoded

    def _prefixes(self, span: _TokenSpan) -> list[tuple[str, list[int]]]:
        """Return the prefixes to try in front of a span, with their ids; the first that stays intact is used.

        After a special token that token comes first: some add a space after themselves or strip one.
        """
        if span.preceding is None:
            return self._anchors
        if span.preceding == "":
            return [("", [])]
        return [(span.preceding, [self._token_ids[span.preceding]]), *self._anchors]

    def _concat_spans(
        self, row: _RenderedRow, span_ids: Sequence[list[int] | TemplateError]
    ) -> Encoded | TemplateError:
        ids: list[int] = []
        loss_mask: list[bool] = []
        for span, piece in zip(row.spans, span_ids, strict=True):
            if isinstance(piece, TemplateError):
                return piece
            if not span.ids and self._has_injected_token(span.text, piece):
                actual = f"the tokenizer produces a special token from {span.text[:40]!r}"
                return TemplateError(f"{actual} (it normalizes the text first); remove those characters")
            ids += piece
            loss_mask += [span.trained] * len(piece)
        return Encoded(ids, loss_mask, row.num_escaped, row.num_left_out)

    def _has_injected_token(self, text: str, ids: Sequence[int]) -> bool:
        """Return True if there are more special ids than special tokens in the (escaped) text."""
        num_special = sum(map(self._injectable_ids.__contains__, ids))
        return num_special > 0 and num_special > len(self._injectable.pattern.findall(text))


def _mask_thoughts(segments: Sequence[Segment], messages: Sequence[Message]) -> list[Segment]:
    """Return the segments with no loss on thoughts.

    Raises:
        TemplateError: the end of a trained thought was not found in the text.
    """
    if messages[-1].reasoning and messages[-1].trained and not any(segment.thought for segment in segments):
        raise TemplateError("the end of the thought was not found, so it cannot be masked")
    return [replace(segment, trained=False) if segment.thought else segment for segment in segments]


def _span_kind(segment: Segment) -> str:
    return segment.kind if segment.kind in ("bos", "eos") else "text"
