"""What the fields of preference rows hold: dialogues, turns, numbers, votes, labels."""

import re
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

from data_templates._segments import REPLIES, Message, Role
from data_templates.hh import ASSISTANT, HUMAN
from finetune.data.layouts import RowProblem, checked_text, short, system_turn, text_field, turns_field

Columns = Mapping[str, Any]
SPEAKERS: dict[str, Role] = {HUMAN: "user", ASSISTANT: "assistant"}
SPEAKER = re.compile(f"({re.escape(HUMAN)}|{re.escape(ASSISTANT)})")
A_DIALOGUE = r"a dialogue that begins with '\n\nHuman:', or a list of turns; or a column with the prompt"
WRITTEN = "hold a number or true/false where a completion's text stands, read as text"

LABELS = {"true": True, "1": True, "false": False, "0": False}
"""Good or bad, in lower case: JSON's booleans, and what CSV files make of them."""


def is_dialogue(text: str) -> bool:
    """Tell whether a text is a dialogue in the layout of Anthropic's HH."""
    return text.startswith(HUMAN)


def dialogue(text: str) -> list[Message]:
    r"""Return the turns of an HH dialogue, without the blanks around what is said.

    >>> [turn.content for turn in dialogue("\n\nHuman: Hi\n\nAssistant: Hello.")]
    ['Hi', 'Hello.']
    """
    pieces = SPEAKER.split(text)
    return [
        Message(SPEAKERS[who], said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def question(columns: Columns, name: str) -> list[Message]:
    """Return the turns of a prompt that is a text, an HH dialogue or a list of turns.

    A dialogue may end in ``Assistant:``, where the completion begins.
    """
    if not isinstance(columns[name], str):
        return with_system(columns, turns(columns, name))
    text = text_field(columns, name)
    if not is_dialogue(text):
        return with_system(columns, [Message("user", text)])
    said = dialogue(text)
    opened = said[-1].role == "assistant" and not said[-1].content
    return with_system(columns, said[:-1] if opened else said)


def turns(columns: Columns, name: str) -> list[Message]:
    """Return a column's turns, with role and content or from and value; a single turn stands for a list."""
    value = columns[name]
    several = [value] if isinstance(value, dict) else value
    first = several[0] if isinstance(several, list) and several else None
    names = ("from", "value") if isinstance(first, dict) and "from" in first else ("role", "content")
    return turns_field({name: several}, name, *names)


def with_system(columns: Columns, messages: list[Message]) -> list[Message]:
    """Put the row's system text before turns that have none of their own."""
    return messages if messages[0].role == "system" else [*system_turn(columns), *messages]


def completion(columns: Columns, name: str) -> list[Message]:
    """Return what a completion's column says: a reply alone, or a dialogue that ends with it."""
    value = columns[name]
    if isinstance(value, (list, dict)):
        return turns(columns, name)
    if not isinstance(value, str):
        raise RowProblem(name, f"found {short(value)}", "text, or a list of turns")
    text = checked_text(value, name)
    return dialogue(text) if is_dialogue(text) else [Message("assistant", text)]


def whole(
    asked: Sequence[Message], said: Sequence[Message], name: str
) -> tuple[list[Message], Message | None]:
    """Return the turns before a completion, and the completion: None where a dialogue ends with a question.

    Args:
        asked: the prompt where a column holds it.
        said: what the completion's column says, with the prompt in it or without.
        name: that column.
    """
    first = next((turn for turn in said if turn.role != "system"), said[0])
    if first.role in REPLIES and not asked:
        raise RowProblem(name, f"a reply without its prompt, {short(first.content)}", A_DIALOGUE)
    every = [*asked, *said] if first.role in REPLIES else list(said)
    return (every[:-1], every[-1]) if every[-1].role in REPLIES else (every, None)


def number(value: Any, field: str, expected: str = "a finite number") -> float:
    """Return a finite number; a text that holds one counts, as CSV files have it."""
    try:
        found = nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = nan
    if not isfinite(found):
        raise RowProblem(field, f"found {short(value)}", expected)
    return found


def numbers(value: Any, field: str, count: int, of: str) -> list[float]:
    """Return a list of finite numbers, one for each of ``count`` completions in column ``of``."""
    if not isinstance(value, list):
        raise RowProblem(field, f"found {short(value)}", "a list of numbers")
    if len(value) != count:
        raise RowProblem(field, f"{len(value)} of them for {count} {of}", f"one for each of the {of}")
    return [number(entry, f"{field}[{index}]") for index, entry in enumerate(value)]


def listed(columns: Columns, name: str, of: str = "completions") -> list[Any]:
    """Return a column's list of at least two."""
    value = columns[name]
    if not isinstance(value, list):
        raise RowProblem(name, f"found {short(value)}", f"a list of {of}")
    if len(value) < 2:
        raise RowProblem(name, f"a list of {len(value)}", f"at least two {of} to compare")
    return value


def member(entry: Any, name: str, field: str) -> Any:
    """Return a named member of a list's object."""
    if not isinstance(entry, dict) or entry.get(name) is None:
        raise RowProblem(field, f"found {short(entry)}", f"an object with '{name}'")
    return entry[name]


def label(value: Any) -> bool:
    """Return whether a completion is labelled good."""
    found = LABELS.get(str(value).lower()) if isinstance(value, (bool, int, str)) else None
    if found is None:
        raise RowProblem("label", f"found {short(value)}", "true or 1 (good), false or 0 (bad)")
    return found


def vote(value: Any, field: str) -> int:
    """Return a vote: 1 or 2 for the better response, 0 for a tie."""
    found = number(value, field, "1 or 2 (the better response), or 0 (a tie)")
    if found not in (0, 1, 2):
        raise RowProblem(field, f"found {short(value)}", "1 or 2 (the better response), or 0 (a tie)")
    return int(found)


def written(value: Any, field: str) -> str:
    """Return a response's text; what a table's reader took for a number or a truth value is text again."""
    return str(value) if isinstance(value, (bool, int, float)) else checked_text(value, field)
