"""The one way from messages to token ids: training rows, held-out prompts, samples and chat all come through here."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from data_templates import model as model_template
from data_templates._segments import Message, Segment, Template, TemplateError, render
from finetune.recipe.discovery import load_plugin
from finetune.recipe.errors import Problem, UserError


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as token ids; ``trained[i]`` says whether token i is to be learnt. Both of length T."""

    input_ids: list[int]
    trained: list[bool]
    written_apart: int = 0


class Encoder:
    """Writes conversations as token ids with one template and one tokenizer.

    Stretches of equal label are encoded one by one, so that the tokens of a prompt are the same whether a reply
    follows (training) or not (generation), and no token straddles the border between them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, *, system: str | None = None) -> None:
        """Bind a tokenizer to ``data_templates/<template>.py``, or to its own chat template for ``model``.

        Raises:
            UserError: the tokenizer has no EOS, or no chat template where the recipe asks for it.
        """
        self.tokenizer = tokenizer
        self.name = template
        self.system = system
        if tokenizer.eos_token_id is None:
            found = "the tokenizer has no EOS token"
            raise UserError(Problem("model.base", found, "an EOS token, or no reply would ever end"))
        self.special_tokens = sorted(set(tokenizer.all_special_tokens))
        self.template = self._template(template)
        self.stop_ids = sorted({tokenizer.eos_token_id, *self._known(self.template.stop)})
        self._bos = _bos_id(tokenizer)
        self._anchor = _anchor(tokenizer)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Return a conversation's token ids and which of them carry loss.

        Raises:
            TemplateError: the template cannot write this conversation.
        """
        if self.system and messages and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        segments, written_apart = render(self.template, messages, special_tokens=self.special_tokens)
        ids: list[int] = []
        trained: list[bool] = []
        for (kind, label), pieces in groupby(segments, key=lambda piece: (_kind(piece), piece.trained)):
            new = self._encode_run(kind, list(pieces), first=not ids or ids[-1] == self._bos)
            if kind != "bos" and self._bos is not None and ids == [self._bos] and new[:1] == ids:
                new = new[1:]
            ids += new
            trained += [label] * len(new)
        return Encoded(ids, trained, written_apart)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids up to where the assistant's reply begins; the last message is the user's."""
        return self.encode(messages).input_ids

    def decode_reply(self, ids: Sequence[int]) -> str:
        """Return a reply's text up to its first stop token."""
        kept = []
        for token in ids:
            if token in self.stop_ids:
                break
            kept.append(token)
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def fingerprint(self) -> str:
        """Return a digest of everything that decides the token ids: tokenizer, template and system text."""
        sources = [load_plugin("data_templates", self.name, where="data.template").__file__]
        sources.append(load_plugin("data_templates", "model", where="data.template").__file__.replace("model.py", "_segments.py"))
        code = [open(str(path), encoding="utf-8").read() for path in sources]
        parts = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.system, *code]
        parts.append([self._bos, self.stop_ids, self.special_tokens])
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def _template(self, name: str) -> Template:
        if name != "model":
            template: Template = load_plugin("data_templates", name, where="data.template").TEMPLATE
            return template
        if not self.tokenizer.chat_template:
            found = "the tokenizer of this base has no chat template"
            repair = "use data.template=chatml (or alpaca, vicuna, llama2)"
            raise UserError(Problem("data.template", f"'model', but {found}", "a template of data_templates/", repair))
        return model_template.bind(self._chat, stop=self.special_tokens)

    def _chat(self, messages: list[dict[str, str]], opened: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        except Exception as error:  # a Jinja template raises what it likes; its text is what the user needs
            raise TemplateError(f"the model's own chat template refuses this conversation: {error}") from error
        return str(text)

    def _known(self, tokens: Sequence[str]) -> list[int]:
        ids = [self._special_id(token) for token in tokens]
        return [token_id for token_id in ids if token_id is not None]

    def _special_id(self, token: str) -> int | None:
        """Return the id of ``token`` where the tokenizer has it as one special token."""
        return self.tokenizer.convert_tokens_to_ids(token) if token in self.special_tokens else None

    def _encode_run(self, kind: str, pieces: list[Segment], *, first: bool) -> list[int]:
        if kind == "bos":
            return [] if self._bos is None else [self._bos] * len(pieces)
        if kind == "eos":
            ends = [self._special_id(piece.text) for piece in pieces]
            return [int(self.tokenizer.eos_token_id) if end is None else end for end in ends]
        text = "".join(piece.text for piece in pieces)
        if first or not self._anchor:
            return _encode(self.tokenizer, text)
        return _encode(self.tokenizer, self._anchor + text)[len(_encode(self.tokenizer, self._anchor)) :]


def _kind(piece: Segment) -> str:
    return piece.kind if piece.kind in ("bos", "eos") else "text"


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS id if this tokenizer puts it in front of a text by itself, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _anchor(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text to encode in front of a stretch that does not begin a sequence, or nothing.

    SentencePiece-style tokenizers put a blank in front of whatever they encode; behind a line feed they do not.

    Raises:
        UserError: the tokenizer joins the line feed with what follows, so that no stretch could be encoded alone.
    """
    tokens = tokenizer.convert_ids_to_tokens(_encode(tokenizer, "a"))
    if not tokens or not tokens[0].startswith("▁"):
        return ""
    alone, together = _encode(tokenizer, "\n"), _encode(tokenizer, "\na")
    if together[: len(alone)] != alone:
        found = "the tokenizer merges a line feed with the text behind it"
        raise UserError(Problem("model.base", found, "a tokenizer that encodes a stretch of text by itself"))
    return "\n"
