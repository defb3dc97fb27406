"""The words that every template speaks: messages come in, segments go out.

A template never says which *characters* of a rendered text carry loss; it says which *segments* do. Masks are
made from these labels, so nothing ever searches a text for a response marker.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from data_templates._markers import Markers

Role = Literal["system", "tools", "user", "observation", "assistant", "function_call"]
"""Who speaks. ``tools`` are the functions that may be called, ``observation`` is what one returned."""

REPLIES: tuple[Role, ...] = ("assistant", "function_call")
"""What the model itself writes."""
FOR_TOOLS: tuple[Role, ...] = ("tools", "function_call", "observation")


class TemplateError(ValueError):
    """A conversation that a template cannot render; the message says what it takes instead."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``context`` is Alpaca's ``input``; ``trained`` matters for replies alone.

    A ``tools`` turn holds one JSON object ``{"type": "function", "function": {...}}`` a line, a
    ``function_call`` one ``{"name": ..., "arguments": {...}}`` a line.
    """

    role: Role
    content: str
    context: str = ""
    trained: bool = True


DOCUMENT_START = Message("user", "", trained=False)
"""What stands before a plain text in place of a question: nothing; the text is what is written then."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation.

    ``markup`` is the template's own text (special tokens in it count as such), ``content`` came from the
    data, ``bos`` stands for whatever the tokenizer begins a sequence with, ``eos`` for what ends a turn: the
    special token in ``text`` where the tokenizer has it, else its EOS. ``trained`` pieces carry loss.
    ``reply`` pieces are what the model itself writes, learnt or not: they become tokens apart from what
    stands before them, because at generation nothing stands behind the prompt yet.
    """

    kind: Literal["markup", "content", "bos", "eos"]
    text: str = ""
    trained: bool = False
    reply: bool = False


BOS = Segment("bos")


def markup(text: str) -> Segment:
    """Return a piece of the template's own text, which carries no loss."""
    return Segment("markup", text)


def reply(message: Message, *, before: str = "", after: str = "", end: str = "") -> list[Segment]:
    """Return a reply and the token that ends it.

    ``before`` and ``after`` are blanks that the model itself has to write; ``end`` is the turn's own end
    token, for tokenizers that have it (EOS otherwise).
    """
    trained = message.trained
    return [
        *([Segment("markup", before, trained, reply=True)] if before else []),
        Segment("content", message.content, trained, reply=True),
        *([Segment("markup", after, trained, reply=True)] if after else []),
        Segment("eos", end, trained, reply=True),
    ]


def render_document(messages: Sequence[Message]) -> list[Segment]:
    """Render a plain text behind DOCUMENT_START: no prompt, no markup, and EOS at its end."""
    return [BOS, *(piece for message in messages[1:] for piece in reply(message))]


@dataclass(frozen=True, slots=True)
class Template:
    """A way to write a conversation down.

    ``render`` takes messages; when the last one is not the assistant's, the result ends where a reply begins
    (that is the prompt for generation, by the same code that wrote the training rows). ``markers`` begin or
    end turns and are written apart in user text; ``stop`` names the tokens that end a reply besides EOS.
    ``tools`` says that it has words for tools, calls and observations too.
    """

    render: Callable[[Sequence[Message]], list[Segment]]
    markers: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    tools: bool = False


def render(
    template: Template, messages: Sequence[Message], *, special_tokens: Sequence[str] = ()
) -> tuple[list[Segment], int]:
    """Render a conversation in which no content can pass for a turn or a special token.

    Returns:
        The segments, and how many markers or special tokens in the data's own text were written apart.

    Raises:
        TemplateError: the roles come in an order that cannot be a conversation, or that this template cannot
            write, or a text is no valid Unicode.
    """
    check_roles(messages)
    _check_tools(template, messages)
    markers = Markers.of((*template.markers, *special_tokens))
    harmless = []
    total = 0
    for message in messages:
        _check_unicode(message)
        content, in_content = markers.write_apart(message.content)
        context, in_context = markers.write_apart(message.context)
        # Published sets hold inputs of one blank or line feed, which mean "no input".
        harmless.append(replace(message, content=content, context=context if context.strip() else ""))
        total += in_content + in_context
    segments, at_borders = apart_at_borders(template.render(harmless), markers)
    return segments, total + at_borders


def apart_at_borders(segments: Sequence[Segment], markers: Markers) -> tuple[list[Segment], int]:
    """Put a blank where the end of one piece and the beginning of the next would make a marker together.

    A marker that the template alone writes stays. Where two contents meet the blank goes to the later one, so
    that a prompt never depends on the reply behind it.

    Returns:
        The segments, and how many blanks were needed.

    Raises:
        TemplateError: a blank cannot keep the two apart (a special token that itself begins or ends with
            one).
    """
    result: list[Segment] = []
    total = 0
    for segment in segments:
        piece, tries = segment, 0
        while (
            back := 0
            if piece.kind in ("bos", "eos")
            else markers.over_border(_tail(result, markers), piece.text)
        ):
            place = _last_content(result, back)
            if piece.kind == "content":
                piece = replace(piece, text=f" {piece.text}")
            elif place is None:
                break  # the template's own marker, in two pieces
            else:
                result[place] = replace(result[place], text=f"{result[place].text} ")
            tries += 1
            if tries > markers.longest:
                raise TemplateError(f"no blank keeps {segment.text[:20]!r} apart from the text before it")
        result.append(piece)
        total += tries
    return result, total


def _tail(segments: Sequence[Segment], markers: Markers) -> str:
    """Return the last characters since BOS or EOS: no text joins across one of these."""
    tail = ""
    for segment in reversed(segments):
        if segment.kind in ("bos", "eos") or len(tail) >= markers.longest:
            break
        tail = segment.text + tail
    return tail


def _last_content(segments: Sequence[Segment], back: int) -> int | None:
    """Return the index of the last content among the last ``back`` characters, None if there is none."""
    for index in reversed(range(len(segments))):
        if back <= 0:
            return None
        if segments[index].kind == "content" and segments[index].text:
            return index
        back -= len(segments[index].text)
    return None


def _check_unicode(message: Message) -> None:
    try:
        (message.content + message.context).encode()
    except UnicodeEncodeError as error:
        found = f"half a character ({error.object[error.start]!r}) at position {error.start + 1}"
        raise TemplateError(f"the {message.role}'s text holds {found}; expected valid Unicode") from error


def check_roles(messages: Sequence[Message]) -> None:
    """Raise TemplateError unless the turns make a conversation.

    That is: perhaps a system turn, perhaps tools, then user and assistant in turn; a call is a reply too, and
    what it returned is asked in the user's place.
    """
    turns = [message.role for message in messages]
    body = turns[1:] if turns[:1] == ["system"] else turns
    body = body[1:] if body[:1] == ["tools"] else body
    if body[:1] != ["user"] or not all(_may_follow(one, next_one) for one, next_one in pairwise(body)):
        raise TemplateError(
            f"the turns are [{', '.join(turns)}]; expected an optional system turn, then user and assistant "
            "in turn, beginning with user (function_call in the assistant's place, observation behind it)"
        )


def _may_follow(turn: Role, next_turn: Role) -> bool:
    if turn not in REPLIES:
        return next_turn in REPLIES
    return next_turn == "user" or (turn, next_turn) == ("function_call", "observation")


def _check_tools(template: Template, messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, 1):
        if message.role in FOR_TOOLS and not template.tools:
            raise TemplateError(
                f"turn {number} is {message.role}, and this template has no words for tools; use 'toolcall'"
            )


def asked(message: Message) -> list[Segment]:
    """Return what a user said, with its ``context`` (Alpaca's ``input``) below it."""
    said = [Segment("content", message.content)]
    return [*said, markup("\n\n"), Segment("content", message.context)] if message.context else said


def with_context(message: Message) -> str:
    """Return a user turn's text, with its ``context`` (Alpaca's ``input``) below it."""
    return f"{message.content}\n\n{message.context}" if message.context else message.content


def split_system(messages: Sequence[Message], default: str = "") -> tuple[str, list[Message]]:
    """Return the system text (``default`` where there is none or a blank one) and the turns behind it."""
    if messages[0].role == "system":
        return messages[0].content if messages[0].content.strip() else default, list(messages[1:])
    return default, list(messages)


def only_one_exchange(name: str, turns: Sequence[Message]) -> None:
    """Raise TemplateError when a template that holds one exchange is given a longer conversation."""
    if len(turns) > 2:
        raise TemplateError(
            f"template '{name}' holds one exchange, and this conversation has {len(turns)} turns; "
            "use 'vicuna', 'chatml' or 'llama2' for several turns"
        )
