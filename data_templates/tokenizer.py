"""The chat template (Jinja) of the base's tokenizer, as labeled segments.

A reply is what the template writes for it after the generation prompt: the prompt is rendered without the
reply, the conversation with it, and the difference is trained. Special tokens inside a reply (the channels of
gpt-oss) belong to it. The special tokens after the reply's last text end it. Where a template renders an
earlier reply differently once other turns follow (thoughts are kept in the last turn only), or ends only the
last one, ``Template.split`` returns one row for each reply: its prompt is exactly that of inference.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from os.path import commonprefix
from typing import Any, Literal, Protocol

from data_templates._openai import Form, to_openai, write_thought
from data_templates._parsing import ReplyParser
from data_templates._shapes import (
    CALL,
    EMPTY_THOUGHT,
    EXCHANGE,
    OPENED_THOUGHT,
    OWN,
    PLACEHOLDER,
    QUESTION,
    LeftOutError,
    Part,
    Shape,
    describe_loss,
    find_form,
    find_shape,
    with_placeholders,
)
from data_templates.markers import Markers
from data_templates.segments import (
    Message,
    Segment,
    Template,
    TemplateError,
    lift_thought,
    markup,
    with_context,
)

MIN_MARKER_LENGTH = 3
"""Minimum number of characters of a marker: a lone colon or bracket begins no turn."""
CACHE_SIZE = 256
"""Renderings kept: the turns of one conversation are rendered several times, with and without the next."""
EMPTY_THOUGHT_OF_PROMPT = re.compile(r"<.*(?:think|thought|reasoning).*>\s*", re.DOTALL)
"""What a generation prompt adds to a reply's header so that the model does not think."""
CLOSED_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>\s*\Z")
"""The end of a generation prompt after which no thought can begin."""
OTHER_TEMPLATE = "use 'chatml' or another listed template"


class ChatTemplate(Protocol):
    """Renders messages in OpenAI's form as text, with or without the generation prompt."""

    def __call__(
        self, messages: list[dict[str, Any]], opened: bool, tools: list[dict[str, Any]] | None = None
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """A last reply as the template writes it: ``prompt + thought + text + end + after``.

    ``text`` and ``end`` are generated; ``end`` is "" if the template writes no special token after the text.
    """

    prompt: str
    thought: str
    text: str
    end: str
    after: str

    def segments(self, trained: bool) -> list[Segment]:
        """Return the reply's segments without its prompt; EOS ends it if the template writes no end."""
        end = Segment("markup" if self.end else "eos", self.end, trained, reply=True)
        thought = [Segment("content", self.thought, trained, True, True)] if self.thought else []
        text = Segment("content", self.text, trained, reply=True)
        return [*thought, text, end, *([markup(self.after)] if self.after else [])]


def bind_chat_template(
    chat: ChatTemplate, *, special_tokens: Sequence[str], added_tokens: Sequence[str] = ()
) -> Template:
    """Return the template of a tokenizer.

    Args:
        chat: the tokenizer's chat template.
        special_tokens: those after a reply's text end it, and carry loss.
        added_tokens: the tokenizer's other added tokens (``<think>``), which may occur in the data.
    """
    bound = BoundTemplate(chat, special_tokens, knows_thoughts="<think>" in (*special_tokens, *added_tokens))
    # All added tokens are escaped in the data, so none of them is a marker of plain text.
    special_pattern = Markers.of([*special_tokens, *added_tokens]).pattern
    return Template(
        bound.render,
        markers=_turn_markers(bound, special_pattern),
        stop=bound.stop_tokens(),
        tools=True,
        reasoning=True,
        split=bound.split,
        num_left_out=bound.num_left_out,
        parse=ReplyParser(bound.write_reply).parse,
        special_inside=bound.has_special_inside(),
        inserts_thoughts=bound.inserts_thoughts,
        render_whole=bound.render_whole,
    )


class BoundTemplate:
    """A chat template with the form of messages that it takes."""

    def __init__(self, chat: ChatTemplate, special_tokens: Sequence[str], *, knows_thoughts: bool) -> None:
        """Find the form by rendering placeholders."""
        self._chat = chat
        self._special = Markers.of(special_tokens).pattern
        self._special_run = re.compile(f"(?:{self._special.pattern})+")
        self._shapes: dict[tuple[object, ...], Shape] = {}
        self._form = find_form(self._render_form, knows_thoughts=knows_thoughts)
        self.render_text = lru_cache(CACHE_SIZE)(partial(self._render_form, form=self._form))

    @property
    def inserts_thoughts(self) -> bool:
        """True if the template leaves thoughts out of all replies."""
        return self._form.reasoning == "insert"

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """Return a conversation's segments; earlier trained replies must read as the template writes them."""
        turns = self._lift_thoughts(messages)
        self._shape(turns)
        if turns[-1].role != "assistant":
            return self._history(turns, self.render_text(turns, True), is_prompt=True)
        history = self._history(turns[:-1], self.render_text(turns[:-1], True), is_prompt=False)
        return [*history, *self._reply(turns).segments(turns[-1].trained)]

    def render_whole(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation in one piece."""
        return self.render_text(self._lift_thoughts(messages), messages[-1].role != "assistant")

    def split(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return one conversation for each trained reply, unless one rendering serves them all."""
        turns = self._lift_thoughts(messages)
        trained = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
        if trained in ([], [len(turns) - 1]) or self._is_stable(turns, trained):
            return [list(messages)]
        untrained = [replace(turn, trained=False) for turn in turns]
        return [[*untrained[:index], turns[index]] for index in trained]

    def num_left_out(self, messages: Sequence[Message]) -> int:
        """Return the number of earlier thoughts and texts that the template leaves out of a conversation."""
        return self._shape(self._lift_thoughts(messages)).num_left_out

    def write_reply(self, reply: Message) -> tuple[str, str]:
        """Return the thought and the text of a reply to some question, without its end."""
        written = self._reply((QUESTION, *self._lift_thoughts([reply])))
        return written.thought, written.text

    def has_special_inside(self) -> bool:
        """Return True if replies have special tokens inside, as the channels of gpt-oss."""
        for reply in (EXCHANGE[1], CALL[1], replace(EXCHANGE[1], reasoning="c")):
            try:
                if self._special.search("".join(self.write_reply(reply))):
                    return True
            except TemplateError:
                continue
        return False

    def stop_tokens(self) -> tuple[str, ...]:
        """Return the special tokens that stop the generation of a reply.

        The template ends a reply with them, or begins the next turn with them where it writes no end.
        """
        stop: dict[str, None] = {}
        for messages in (EXCHANGE, CALL):
            # With a system turn too, for templates that reject a conversation without one.
            for turns in (messages, (Message("system", "c"), *messages)):
                try:
                    end = self._reply(turns).end
                    following = "" if end else self._text_after(turns)
                except TemplateError:
                    continue  # reported for each row when it is rendered
                next_turn = self._special.match(following)
                stop |= dict.fromkeys([next_turn[0]] if next_turn else self._special.findall(end)[-1:])
                break
        return tuple(stop)

    def _text_after(self, turns: tuple[Message, ...]) -> str:
        """Return the text that the template writes after a reply if another turn follows."""
        next_turn = Message("observation", "a") if turns[-1].tool_calls else QUESTION
        return self.render_text((*turns, next_turn), False).removeprefix(self.render_text(turns, False))

    def _render_form(self, messages: Sequence[Message], opened: bool, *, form: Form) -> str:
        turns, tools = to_openai(messages, form)
        return self._chat(turns, opened) if tools is None else self._chat(turns, opened, tools)

    def _lift_thoughts(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Move thoughts at the beginning of texts to where the template has a place for them."""
        has_place = self._form.reasoning in ("field", "insert")
        return tuple(lift_thought(message) if has_place else message for message in messages)

    def _shape(self, turns: tuple[Message, ...]) -> Shape:
        """Return the shape of a conversation, tried once for each sequence of roles and parts."""
        key = tuple(
            (turn.role, bool(turn.content.strip()), bool(turn.reasoning), len(turn.tool_calls.splitlines()))
            for turn in turns
        )
        if key not in self._shapes:
            self._shapes[key] = find_shape(self._render_form, turns, self._form, self._special)
        return self._shapes[key]

    def _history(self, turns: tuple[Message, ...], text: str, *, is_prompt: bool) -> list[Segment]:
        """Return the segments of a prompt: replies are tokenized as they were generated.

        Raises:
            TemplateError: an earlier reply is trained and reads differently here; not if ``is_prompt``, as
                nothing is trained on a prompt alone.
        """
        replies = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        prompts = {index: self.render_text(turns[:index], True) for index in replies}
        starts = {index: len(prompt) for index, prompt in prompts.items() if text.startswith(prompt)}
        segments: list[Segment] = []
        position = 0
        for index in replies:
            if index not in starts:
                if turns[index].trained and not is_prompt:
                    raise TemplateError(_describe_mismatch(index + 1))
                continue
            limit = next((starts[later] for later in replies if later > index and later in starts), len(text))
            start = starts[index]
            pieces = self._history_reply(turns[: index + 1], text[start:limit], is_prompt=is_prompt)
            segments += [markup(text[position:start]), *pieces]
            position = start + sum(len(piece.text) for piece in pieces)
        return [*segments, markup(text[position:])] if text[position:] else segments

    def _history_reply(self, turns: tuple[Message, ...], text: str, *, is_prompt: bool) -> list[Segment]:
        """Return the segments of an earlier reply, with which ``text`` begins."""
        trained = turns[-1].trained
        if is_prompt or not trained:
            # A special token separates tokens anyway; without one the text is tokenized in one piece.
            match = self._special_run.search(text)
            return _history_segments(text[: match.start()], match[0], trained) if match else []
        reply = self._reply(turns)
        end = text.find(reply.end) if reply.end else len(reply.thought + reply.text)
        if end < 0 or (not reply.end and not text.startswith(reply.thought + reply.text)):
            raise TemplateError(
                f"{OWN} ends turn {len(turns)} differently once other turns follow, so the end of the reply "
                f"is unknown; {OTHER_TEMPLATE}"
            )
        return _history_segments(text[:end], reply.end, trained)

    def _is_stable(self, turns: tuple[Message, ...], trained: Sequence[int]) -> bool:
        """Return True if each trained reply reads in the conversation as at the end of one."""
        try:
            text = self.render_text(turns, turns[-1].role != "assistant")
            replies = [self._reply(turns[: index + 1]) for index in trained]
        except TemplateError:
            return False  # each row is reported by itself
        if not text.startswith(replies[-1].prompt):
            return False
        # Without an end in the template, EOS ends a row; inside a conversation it would stand for nothing.
        earlier = replies if trained[-1] < len(turns) - 1 else replies[:-1]
        return all(
            reply.end and text.startswith(reply.prompt + reply.thought + reply.text + reply.end)
            for reply in earlier
        )

    def _reply(self, turns: tuple[Message, ...]) -> Reply:
        """Return what the template writes for the last turn, which is a reply, after its prompt."""
        reply, number = turns[-1], len(turns)
        prompt = self.render_text(turns[:-1], True)
        ending = self._shape(turns).ending
        written = self._written(turns, prompt)
        if not written.endswith(ending):
            raise TemplateError(f"{OWN} ends turn {number} like no other reply; {OTHER_TEMPLATE}")
        text = self._insert_thought(reply, prompt, written[: len(written) - len(ending)])
        _check_kept(reply, text, number)
        thought = self._thought_of(reply, text)
        run = self._special_run.match(ending)
        end = run[0] if run else ""
        return Reply(prompt, thought, text[len(thought) :], end, ending[len(end) :])

    def _written(self, turns: tuple[Message, ...], prompt: str) -> str:
        """Return the text that the template writes for the last turn, after its prompt."""
        full = self.render_text(turns, False)
        if full.startswith(prompt):
            return full[len(prompt) :]
        # The same with another text, which begins like no prompt and like no other reply.
        other = self.render_text((*turns[:-1], with_placeholders(turns)[0][-1]), False)
        shared = len(commonprefix([prompt, other]))
        opened = OPENED_THOUGHT.search(prompt)
        if opened and shared >= opened.start():
            # The reply is written without the thought that its prompt opens, or with an empty one.
            return full[opened.start() :].removeprefix(f"<{opened[1]}>").lstrip("\n")
        if EMPTY_THOUGHT_OF_PROMPT.fullmatch(prompt[shared:]) and not turns[-1].reasoning:
            return full[shared:]
        # Some templates change earlier turns once the reply is there. At inference it is not.
        header = prompt.removeprefix(self.render_text(turns[:-1], False))
        start = commonprefix([full, other]).rfind(header)
        if not header or header == prompt or start < 0:
            closed = turns[-1].reasoning and CLOSED_THOUGHT.search(prompt)
            raise TemplateError(_describe_closed(len(turns)) if closed else _describe_mismatch(len(turns)))
        return full[start + len(header) :]

    def _insert_thought(self, reply: Message, prompt: str, text: str) -> str:
        """Return a reply's text with the thought that the template leaves out, or with the end of one."""
        opened = OPENED_THOUGHT.search(prompt)
        if opened:
            closing = f"</{opened[1]}>"
            before_content = text.split(reply.content.strip() or None, 1)[0] if text.strip() else ""
            thought = reply.reasoning.strip("\n")
            return text if closing in before_content else f"{thought}\n{closing}\n\n{text}"
        if not reply.reasoning or self._form.reasoning != "insert" or CLOSED_THOUGHT.search(prompt):
            return text
        empty = EMPTY_THOUGHT.match(text)
        return (
            f"{empty[1]}{reply.reasoning}{empty[2]}{text[empty.end() :]}"
            if empty
            else write_thought(reply.reasoning) + text
        )

    def _thought_of(self, reply: Message, text: str) -> str:
        """Return a reply's text up to the end of its thought: a closing tag or a special token."""
        if not reply.reasoning.strip():
            return ""
        thought = re.escape(reply.reasoning.strip())
        end = re.search(rf"{thought}\s*(?:</[^<>\s]+>|{self._special.pattern})\s*", text)
        return text[: end.end()] if end else ""


def _describe_mismatch(number: int) -> str:
    return (
        f"{OWN} changes earlier turns (the generation prompt of turn {number} is not a prefix of the "
        f"conversation), so training and generation would differ; {OTHER_TEMPLATE}"
    )


def _describe_closed(number: int) -> str:
    return (
        f"the generation prompt of turn {number} ends its thought before the reply begins; "
        "data.reasoning=strip removes the thoughts"
    )


def _history_segments(text: str, end: str, trained: bool) -> list[Segment]:
    kind: Literal["markup", "eos"] = "markup" if end else "eos"
    return [Segment("content", text, trained, reply=True), Segment(kind, end, trained, reply=True)]


def _check_kept(reply: Message, text: str, number: int) -> None:
    """Raise LeftOutError unless a reply's thought and text are in what the template writes for it."""
    parts: tuple[tuple[str, Part], ...] = ((reply.reasoning, "thought"), (with_context(reply), "text"))
    for value, part in parts:
        # Templates strip texts and put line feeds around thoughts.
        if value not in text and "".join(value.split()) not in "".join(text.split()):
            raise LeftOutError(describe_loss(number - 1, reply.role, part))


def _turn_markers(bound: BoundTemplate, special_pattern: re.Pattern[str]) -> tuple[str, ...]:
    """Return the plain text around contents that begins or ends turns: ``### Human:``, ``[/INST]``."""
    # Special tokens are escaped anyway, and a word such as ChatML's ``user`` has no meaning without them.
    turns = [Message("user", ""), Message("assistant", ""), Message("user", "")]
    lines: list[str] = []
    for messages in (turns, [Message("system", ""), *turns]):
        try:
            text = bound.render_text(tuple(with_placeholders(messages)[0]), True)
        except TemplateError:
            continue
        pieces = PLACEHOLDER.split(text)[::2]
        lines += [_edge_line(special_pattern.split(piece)[-1], -1) for piece in pieces[:-1]]
        lines += [_edge_line(special_pattern.split(piece)[0], 0) for piece in pieces[1:]]
    # A plain word may begin a turn, but it is too common in the data to be escaped.
    markers = [line for line in lines if len(line) >= MIN_MARKER_LENGTH and not line.isalnum()]
    return tuple(dict.fromkeys(markers))


def _edge_line(text: str, edge: int) -> str:
    """Return the first (0) or last (-1) line of a text."""
    lines = text.strip().splitlines()
    return lines[edge].strip() if lines else ""
