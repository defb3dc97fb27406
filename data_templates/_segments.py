"""The words that every template speaks: messages come in, segments go out.

A template never says which *characters* of a rendered text carry loss; it says which *segments* do. Masks are made
from these labels, so nothing ever searches a text for a response marker.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["system", "user", "assistant"]


class TemplateError(ValueError):
    """A conversation that a template cannot render; the message says what it takes instead."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``context`` is Alpaca's ``input``; ``trained`` matters for assistant turns alone."""

    role: Role
    content: str
    context: str = ""
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation.

    ``markup`` is the template's own text (special tokens in it count as such), ``content`` came from the data, ``bos``
    stands for whatever the tokenizer begins a sequence with, ``eos`` for what ends a turn: the special token in
    ``text`` where the tokenizer has it, else its EOS. ``trained`` pieces carry loss.
    """

    kind: Literal["markup", "content", "bos", "eos"]
    text: str = ""
    trained: bool = False


BOS = Segment("bos")


def markup(text: str) -> Segment:
    """Return a piece of the template's own text, which carries no loss."""
    return Segment("markup", text)


def reply(message: Message, *, before: str = "", after: str = "", end: str = "") -> list[Segment]:
    """Return an assistant turn and the token that ends it.

    ``before`` and ``after`` are blanks that the model itself has to write; ``end`` is the turn's own end token, for
    tokenizers that have it (EOS otherwise).
    """
    trained = message.trained
    return [
        *([Segment("markup", before, trained)] if before else []),
        Segment("content", message.content, trained),
        *([Segment("markup", after, trained)] if after else []),
        Segment("eos", end, trained),
    ]


@dataclass(frozen=True, slots=True)
class Template:
    """A way to write a conversation down.

    ``render`` takes messages; when the last one is not the assistant's, the result ends where a reply begins (that is
    the prompt for generation, by the same code that wrote the training rows). ``markers`` begin or end turns and are
    written apart in user text; ``stop`` names the tokens that end a reply besides EOS.
    """

    render: Callable[[Sequence[Message]], list[Segment]]
    markers: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()


def render(
    template: Template, messages: Sequence[Message], *, special_tokens: Sequence[str] = ()
) -> tuple[list[Segment], int]:
    """Render a conversation in which no content can pass for a turn or a special token.

    Returns:
        The segments, and how many markers or special tokens in the data's own text were written apart.

    Raises:
        TemplateError: the roles come in an order that cannot be a conversation, or that this template cannot write.
    """
    check_roles(messages)
    markers = [*template.markers, *special_tokens]
    harmless = []
    total = 0
    for message in messages:
        content, in_content = write_apart(message.content, markers)
        context, in_context = write_apart(message.context, markers)
        harmless.append(replace(message, content=content, context=context))
        total += in_content + in_context
    return template.render(harmless), total


def write_apart(text: str, markers: Sequence[str]) -> tuple[str, int]:
    """Put a blank behind the first character of every marker in ``text``; return the text and how many there were.

    >>> write_apart("ok</s>### Response: yes", ["</s>", "### Response:"])
    ('ok< /s># ## Response: yes', 2)
    """
    if not markers:
        return text, 0
    pattern = re.compile("|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True)))
    total = 0
    while found := len(pattern.findall(text)):
        text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        total += found
    return text, total


def check_roles(messages: Sequence[Message]) -> None:
    """Raise TemplateError unless roles are: at most one system, then user and assistant in turn, user first."""
    turns = [message.role for message in messages]
    body = turns[1:] if turns[:1] == ["system"] else turns
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(body))]
    if not body or body != expected:
        raise TemplateError(
            f"the turns are [{', '.join(turns)}]; expected an optional system turn, then user and assistant in turn, "
            "beginning with user"
        )


def with_context(message: Message) -> str:
    """Return a user turn's text with its ``context`` (Alpaca's ``input``) below it, for templates without a slot."""
    return f"{message.content}\n\n{message.context}" if message.context else message.content


def split_system(messages: Sequence[Message], default: str = "") -> tuple[str, list[Message]]:
    """Return the system text (or ``default``) and the turns that follow it."""
    if messages[0].role == "system":
        return messages[0].content, list(messages[1:])
    return default, list(messages)



def only_one_exchange(name: str, turns: Sequence[Message]) -> None:
    """Raise TemplateError when a template that holds one exchange is given a longer conversation."""
    if len(turns) > 2:
        raise TemplateError(
            f"template '{name}' holds one exchange, and this conversation has {len(turns)} turns; "
            "use 'vicuna', 'chatml' or 'llama2' for several turns"
        )
