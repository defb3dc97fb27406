"""Encoder: messages to token ids and loss mask, for training rows, prompts, samples and chat alike."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import data_templates
from data_templates import model as model_template
from data_templates._markers import Markers
from data_templates._segments import (
    DOCUMENT_START,
    Message,
    Segment,
    Template,
    TemplateError,
    render,
    render_document,
)
from finetune.data.conversation import wishing
from finetune.recipe.discovery import load_plugin
from finetune.recipe.errors import Problem, UserError

CHUNK = 2048
"""Conversations per tokenizer call: enough to use every core, few enough to need little memory."""
ANCHORS = ("\n", "\t", "。", "|")
"""Prefixes for encoding a span with tokenizers that add a space to every text, in order of preference."""

SAME: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda text: unicodedata.normalize("NFKC", text), "ＵＳＥＲ："),
    (lambda text: text.replace("▁", " "), "a▁b"),
)
"""Normalizations that some tokenizers apply first, each with a probe text (fullwidth marks become ASCII)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and loss mask of a conversation, both of length T, and the number of escaped markers."""

    input_ids: list[int]
    trained: list[bool]
    written_apart: int = 0


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A span of adjacent segments that is tokenized in one piece: given ``ids`` (BOS, EOS), or ``text``.

    ``preceding`` is the special token that precedes the text, "" at the start of a sequence, None after text.
    """

    trained: bool
    ids: list[int]
    text: str = ""
    behind: str | None = None


class Encoder:
    """Encodes conversations to token ids with one template and one tokenizer.

    Prompt and reply are tokenized separately, so that a prompt has the same tokens whether a reply follows
    (training) or not (generation), and no token spans the boundary. ``system`` is prepended to conversations
    without a system turn; ``control_suffix`` is appended to generation prompts, never to training rows.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, *, system: str | None = None, wish: str = ""
    ) -> None:
        """Raise UserError if the tokenizer has no EOS, or no chat template and ``template`` is `model`."""
        self.tokenizer = tokenizer
        self.name = template
        self.system = system
        self.wish = wish
        if tokenizer.eos_token_id is None:
            found = "the tokenizer has no EOS token"
            raise UserError(Problem("model.base", found, "a tokenizer with an EOS token, to end replies"))
        self.special_tokens = _special_tokens(tokenizer)
        # Tokens that the tokenizer matches as a unit, before it splits a text.
        self._whole_tokens = {**tokenizer.get_added_vocab(), **_ids(tokenizer, self.special_tokens)}
        self.template = self._template(template)
        known = [self._whole_tokens[token] for token in self.template.stop if token in self._whole_tokens]
        self.stop_ids = sorted({int(tokenizer.eos_token_id), *known})
        self._bos = _bos_id(tokenizer)
        self._anchors = _anchors(tokenizer)
        self._same_to_tokenizer = [
            same for same, sample in SAME if _reads_alike(tokenizer, sample, same(sample))
        ]
        # Unknown characters become <unk> anywhere in a text, so <unk> is no sign of an injected token.
        forgeable = [token for token in self.special_tokens if token != tokenizer.unk_token]
        self._forgeable = Markers.of(forgeable)
        self._forgeable_ids = frozenset(_ids(tokenizer, forgeable).values())

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
        for start in range(0, len(conversations), CHUNK):
            encoded += self._encode_chunk(conversations[start : start + CHUNK])
        return encoded

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a generation prompt, up to the start of the reply."""
        return self.encode(wishing(messages, self.wish)).input_ids

    def decode_reply(self, ids: Sequence[int]) -> str:
        """Decode a reply up to its first stop token and strip it."""
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))
        text = self.tokenizer.decode(
            list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).strip()

    def fingerprint(self) -> str:
        """Return a digest of everything that determines the token ids: tokenizer, template, system text."""
        folder = Path(data_templates.__path__[0])
        files = [*sorted(folder.glob("_*.py")), folder / f"{self.name}.py"]
        parts = [_tokenizer_state(self.tokenizer), self.tokenizer.chat_template, self.system]
        parts += [file.read_text(encoding="utf-8") for file in files]
        parts += [self._bos, self.stop_ids, self.special_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _template(self, name: str) -> Template:
        if name != "model":
            template: Template = load_plugin("data_templates", name, where="data.template").TEMPLATE
            return template
        if not self.tokenizer.chat_template:
            found = "the tokenizer of this base has no chat template"
            repair = "use data.template=chatml (or alpaca, vicuna, llama2)"
            raise UserError(
                Problem("data.template", f"'model', but {found}", "a template of data_templates/", repair)
            )
        return model_template.bind(
            self._chat, special_tokens=self.special_tokens, added_tokens=list(self._whole_tokens)
        )

    def _chat(self, messages: list[dict[str, str]], opened: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        except Exception as error:  # a Jinja template may raise anything; its text is what the user needs
            raise TemplateError(
                f"the tokenizer's chat template rejects this conversation: {error}"
            ) from error
        return str(text)

    def _encode_chunk(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | TemplateError]:
        # The spans of all conversations go through the tokenizer in one batch.
        rendered = [self._render(messages) for messages in conversations]
        plans = [[] if isinstance(row, TemplateError) else row[0] for row in rendered]
        stretches = [stretch for plan in plans for stretch in plan if not stretch.ids]
        encoded = iter(self._encode_texts(stretches))
        chunk: list[Encoded | TemplateError] = []
        for row, plan in zip(rendered, plans, strict=True):
            parts = [stretch.ids or next(encoded) for stretch in plan]
            chunk.append(row if isinstance(row, TemplateError) else self._joined(plan, parts, row[1]))
        return chunk

    def _render(self, messages: Sequence[Message]) -> tuple[list[_Stretch], int] | TemplateError:
        try:
            segments, written_apart = self.segments(messages)
        except TemplateError as error:
            return error
        return self._stretches(segments), written_apart

    def segments(self, messages: Sequence[Message]) -> tuple[list[Segment], int]:
        """Return a conversation's segments and the number of escaped markers in its text.

        Raises:
            TemplateError: the template cannot render this conversation.
        """
        template = self.template
        if messages and messages[0] == DOCUMENT_START:
            template = replace(template, render=render_document)
        # A system turn of the data wins over the recipe's.
        elif self.system and messages and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        read = [self._as_read(message) for message in messages]
        return render(template, read, special_tokens=self.special_tokens)

    def _as_read(self, message: Message) -> Message:
        """Apply the tokenizer's own normalizations, so that markers it would see are found in the text."""
        for same in self._same_to_tokenizer:
            message = replace(message, content=same(message.content), context=same(message.context))
        return message

    def _stretches(self, segments: Sequence[Segment]) -> list[_Stretch]:
        """Merge adjacent segments of equal kind, reply and trained flags into spans."""
        stretches: list[_Stretch] = []
        # All segments of one reply have the same trained flag, so the flag never splits a reply's tokens.
        behind: str | None = ""
        for (kind, _, trained), group in groupby(segments, key=lambda s: (_kind(s), s.reply, s.trained)):
            pieces = [piece.text for piece in group]
            if kind == "text":
                text = "".join(pieces)
                stretches += [_Stretch(trained, [], text, behind)] if text else []
                behind = pieces[-1] if pieces[-1] in self._whole_tokens else None if text else behind
            elif kind == "eos":
                ends = [
                    text if text in self._whole_tokens else str(self.tokenizer.eos_token) for text in pieces
                ]
                stretches.append(_Stretch(trained, [self._whole_tokens[end] for end in ends]))
                behind = ends[-1]
            elif self._bos is not None:
                stretches.append(_Stretch(trained, [self._bos] * len(pieces)))
                behind = ""
        return stretches

    def _encode_texts(self, stretches: Sequence[_Stretch]) -> list[list[int] | TemplateError]:
        """Tokenize each span after a prefix with a known tokenization, and return the span's own tokens."""
        encoded: list[list[int] | TemplateError] = [
            TemplateError(f"the tokenizer merges {stretch.text[:20]!r} with any text before it")
            for stretch in stretches
        ]
        tries = {index: self._before(stretch) for index, stretch in enumerate(stretches)}
        while tries:
            texts = [anchors[0][0] + stretches[index].text for index, anchors in tries.items()]
            for (index, anchors), ids in zip(
                list(tries.items()), _encode(self.tokenizer, texts), strict=True
            ):
                head = anchors[0][1]
                # The prefix has its own tokens again, so the rest are exactly the span's.
                if ids[: len(head)] == head:
                    encoded[index] = ids[len(head) :]
                    tries.pop(index)
                else:
                    tries[index] = anchors[1:]
            tries = {index: anchors for index, anchors in tries.items() if anchors}
        return encoded

    def _before(self, stretch: _Stretch) -> list[tuple[str, list[int]]]:
        """Return the prefixes to try in front of a span, with their ids; the first that stays intact is used.

        After a special token that token comes first: some add a space after themselves or strip one.
        """
        if stretch.behind is None:
            return self._anchors
        if stretch.behind == "":
            return [("", [])]
        return [(stretch.behind, [self._whole_tokens[stretch.behind]]), *self._anchors]

    def _joined(
        self, plan: Sequence[_Stretch], parts: Sequence[list[int] | TemplateError], written_apart: int
    ) -> Encoded | TemplateError:
        ids: list[int] = []
        trained: list[bool] = []
        for stretch, part in zip(plan, parts, strict=True):
            if isinstance(part, TemplateError):
                return part
            if not stretch.ids and self._forged(stretch.text, part):
                found = f"the tokenizer produces a special token from {stretch.text[:40]!r}"
                return TemplateError(f"{found} (it normalizes the text first); remove those characters")
            ids += part
            trained += [stretch.trained] * len(part)
        return Encoded(ids, trained, written_apart)

    def _forged(self, text: str, ids: Sequence[int]) -> bool:
        """Return True if there are more special ids than special tokens in the (escaped) text."""
        special = sum(map(self._forgeable_ids.__contains__, ids))
        return special > 0 and special > len(self._forgeable.pattern.findall(text))


def _kind(piece: Segment) -> str:
    return piece.kind if piece.kind in ("bos", "eos") else "text"


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens: named ones, and those only flagged as special (``<|start_header_id|>``)."""
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *marked})


def _ids(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> dict[str, int]:
    return {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _reads_alike(tokenizer: PreTrainedTokenizerBase, one: str, other: str) -> bool:
    first, second = _encode(tokenizer, [one, other])
    return first == second and tokenizer.unk_token_id not in first


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS id if this tokenizer adds it to a text by itself, else None."""
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _anchors(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Return the prefixes for spans inside a sequence, each with its token ids.

    SentencePiece-style tokenizers add a space in front of every text they encode, but not after other text.

    Raises:
        UserError: the tokenizer merges every prefix with what follows, so that no span can be tokenized by
            itself.
    """
    [plain] = _encode(tokenizer, ["a"])
    if not tokenizer.convert_ids_to_tokens(plain)[0].startswith("▁"):
        return [("", [])]
    alone = _encode(tokenizer, list(ANCHORS))
    together = _encode(tokenizer, [f"{anchor}a" for anchor in ANCHORS])
    found = [
        (anchor, head)
        for anchor, head, whole in zip(ANCHORS, alone, together, strict=True)
        if whole[: len(head)] == head
        and not tokenizer.convert_ids_to_tokens(whole)[len(head)].startswith("▁")
    ]
    if not found:
        problem = "the tokenizer merges a line feed with the text after it"
        raise UserError(
            Problem("model.base", problem, "a tokenizer that can encode a piece of text independently")
        )
    return found


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return everything that determines a tokenizer's output, as JSON-serializable data."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        return [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), added]
    # The backend stores padding and truncation of its last call; neither is used here.
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in state.items() if key not in ("padding", "truncation")}
