"""The one way from messages to token ids: training rows, prompts, samples and chat all come through here."""

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
"""Conversations tokenised in one call: enough to keep every core busy, few enough to need little memory."""
ANCHORS = ("\n", "\t", "。", "|")
"""What a stretch is encoded behind where tokenizers begin every text with a blank; the first that suits."""

SAME: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda text: unicodedata.normalize("NFKC", text), "ＵＳＥＲ："),
    (lambda text: text.replace("▁", " "), "a▁b"),
)
"""What some tokenizers do to a text first, with a text that shows it: to them fullwidth marks are marks."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as token ids; ``trained[i]`` says whether token i is to be learnt. Both of length T."""

    input_ids: list[int]
    trained: list[bool]
    written_apart: int = 0


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring segments that become tokens together: ready ``ids`` (BOS, EOS), or ``text`` to encode.

    ``behind`` is the special token that stands before the text, "" where a sequence begins, None behind text.
    """

    trained: bool
    ids: list[int]
    text: str = ""
    behind: str | None = None


class Encoder:
    """Writes conversations as token ids with one template and one tokenizer.

    Prompt and reply are encoded apart, so that the tokens of a prompt are the same whether a reply follows
    (training) or not (generation), and no token straddles the border between them. ``system`` stands before
    conversations without one, ``wish`` behind what is asked of the tuned model (and behind nothing learnt).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, *, system: str | None = None, wish: str = ""
    ) -> None:
        """Bind a tokenizer to ``data_templates/<template>.py``, or to its own chat template for ``model``.

        Raises:
            UserError: the tokenizer has no EOS, or no chat template where the recipe asks for it.
        """
        self.tokenizer = tokenizer
        self.name = template
        self.system = system
        self.wish = wish
        if tokenizer.eos_token_id is None:
            found = "the tokenizer has no EOS token"
            raise UserError(Problem("model.base", found, "an EOS token, or no reply would ever end"))
        self.special_tokens = _special_tokens(tokenizer)
        self._whole_tokens = {**tokenizer.get_added_vocab(), **_ids(tokenizer, self.special_tokens)}
        self.template = self._template(template)
        known = [self._whole_tokens[token] for token in self.template.stop if token in self._whole_tokens]
        self.stop_ids = sorted({int(tokenizer.eos_token_id), *known})
        self._bos = _bos_id(tokenizer)
        self._anchors = _anchors(tokenizer)
        self._same_to_tokenizer = [
            same for same, sample in SAME if _reads_alike(tokenizer, sample, same(sample))
        ]
        # Unknown characters become <unk> wherever they stand: that one forges nothing.
        forgeable = [token for token in self.special_tokens if token != tokenizer.unk_token]
        self._forgeable = Markers.of(forgeable)
        self._forgeable_ids = frozenset(_ids(tokenizer, forgeable).values())

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Return a conversation's token ids and which of them carry loss.

        Raises:
            TemplateError: the template cannot write this conversation.
        """
        [encoded] = self.encode_many([messages])
        if isinstance(encoded, TemplateError):
            raise encoded
        return encoded

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | TemplateError]:
        """Return for each conversation what ``encode`` returns, or the error that it raises.

        Fast tokenizers spread one call over the cores; on a single one it still saves a sixth or more.
        """
        encoded: list[Encoded | TemplateError] = []
        for start in range(0, len(conversations), CHUNK):
            encoded += self._encode_chunk(conversations[start : start + CHUNK])
        return encoded

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids up to where the reply begins; the last message is the user's."""
        return self.encode(wishing(messages, self.wish)).input_ids

    def decode_reply(self, ids: Sequence[int]) -> str:
        """Return a reply's text up to its first stop token, without the blanks around it."""
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))
        text = self.tokenizer.decode(
            list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).strip()

    def fingerprint(self) -> str:
        """Return a digest of everything that decides the token ids: tokenizer, template and system text."""
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
        except Exception as error:  # a Jinja template raises what it likes; its text is what the user needs
            raise TemplateError(
                f"the model's own chat template refuses this conversation: {error}"
            ) from error
        return str(text)

    def _encode_chunk(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | TemplateError]:
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
        """Return a conversation's segments, and how many markers in its text were written apart.

        Raises:
            TemplateError: the template cannot write this conversation.
        """
        template = self.template
        if messages and messages[0] == DOCUMENT_START:
            template = replace(template, render=render_document)
        elif self.system and messages and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        read = [self._as_read(message) for message in messages]
        return render(template, read, special_tokens=self.special_tokens)

    def _as_read(self, message: Message) -> Message:
        """Return a turn in the text that the tokenizer makes of it: markers are what it reads as such."""
        for same in self._same_to_tokenizer:
            message = replace(message, content=same(message.content), context=same(message.context))
        return message

    def _stretches(self, segments: Sequence[Segment]) -> list[_Stretch]:
        """Join neighbours, prompt with prompt and reply with reply: being learnt or not decides no token."""
        stretches: list[_Stretch] = []
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
        """Encode each stretch as it would be encoded where it stands, and keep the stretch's own tokens."""
        encoded: list[list[int] | TemplateError] = [
            TemplateError(f"the tokenizer merges {stretch.text[:20]!r} with whatever stands before it")
            for stretch in stretches
        ]
        tries = {index: self._before(stretch) for index, stretch in enumerate(stretches)}
        while tries:
            texts = [anchors[0][0] + stretches[index].text for index, anchors in tries.items()]
            for (index, anchors), ids in zip(
                list(tries.items()), _encode(self.tokenizer, texts), strict=True
            ):
                head = anchors[0][1]
                if ids[: len(head)] == head:
                    encoded[index] = ids[len(head) :]
                    tries.pop(index)
                else:
                    tries[index] = anchors[1:]
            tries = {index: anchors for index, anchors in tries.items() if anchors}
        return encoded

    def _before(self, stretch: _Stretch) -> list[tuple[str, list[int]]]:
        """Return what to encode in front of a stretch, with its ids: the first that stays as it is serves.

        Behind a special token it is that token, for some put a blank behind themselves or swallow one.
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
                found = f"the tokenizer finds a special token in {stretch.text[:40]!r} that is not there"
                return TemplateError(f"{found} (it changes the text first); leave those characters out")
            ids += part
            trained += [stretch.trained] * len(part)
        return Encoded(ids, trained, written_apart)

    def _forged(self, text: str, ids: Sequence[int]) -> bool:
        """Tell whether more special ids came out than the text, already harmless, has special tokens."""
        special = sum(map(self._forgeable_ids.__contains__, ids))
        return special > 0 and special > len(self._forgeable.pattern.findall(text))


def _kind(piece: Segment) -> str:
    return piece.kind if piece.kind in ("bos", "eos") else "text"


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens: named ones, and those only marked as such (``<|start_header_id|>``)."""
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
    """Return the BOS id if this tokenizer puts it in front of a text by itself, else None."""
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _anchors(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Return the texts to encode in front of a stretch that begins no sequence, each with its own token ids.

    SentencePiece-style tokenizers put a blank in front of whatever they encode; behind other text they do
    not.

    Raises:
        UserError: the tokenizer joins every anchor with what follows, so that no stretch could be encoded
            alone.
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
        problem = "the tokenizer merges a line feed with the text behind it"
        raise UserError(
            Problem("model.base", problem, "a tokenizer that encodes a stretch of text by itself")
        )
    return found


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return all that decides how a tokenizer cuts text, as JSON holds it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        return [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), added]
    # The backend remembers how the last call padded and cut; that decides nothing here.
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in state.items() if key not in ("padding", "truncation")}
