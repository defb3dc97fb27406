"""Parse the fields of preference rows: dialogues, turns, numbers, votes, labels."""

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
A_DIALOGUE = r"a dialogue that begins with '\n\nHuman:', a list of turns, or a column with the prompt"
WRITTEN = "with a number or true/false in place of a completion's text, read as text"

LABELS = {"true": True, "1": True, "false": False, "0": False}
"""Label values in lower case: JSON booleans and their CSV forms."""


def is_dialogue(text: str) -> bool:
    """Return whether a text is a dialogue in the layout of Anthropic's HH."""
    return text.startswith(HUMAN)


def dialogue(text: str) -> list[Message]:
    r"""Return the turns of an HH dialogue, stripped of whitespace.

    >>> [turn.content for turn in parse_dialogue("\n\nHuman: Hi\n\nAssistant: Hello.")]
    ['Hi', 'Hello.']
    """
    pieces = SPEAKER.split(text)
    return [
        Message(SPEAKERS[who], said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def question(columns: Columns, name: str) -> list[Message]:
    """Return the turns of a prompt that is a text, an HH dialogue or a list of turns."""
    if not isinstance(columns[name], str):
        return with_system(columns, turns(columns, name))
    text = text_field(columns, name)
    if not is_dialogue(text):
        return with_system(columns, [Message("user", text)])
    said = dialogue(text)
    # HH prompts end in ``Assistant:``, an empty turn where the completion starts.
    opened = said[-1].role == "assistant" and not said[-1].content
    return with_system(columns, said[:-1] if opened else said)


def turns(columns: Columns, name: str) -> list[Message]:
    """Return a column's turns (role/content or from/value); a single turn is read as a list of one."""
    value = columns[name]
    several = [value] if isinstance(value, dict) else value
    first = several[0] if isinstance(several, list) and several else None
    names = ("from", "value") if isinstance(first, dict) and "from" in first else ("role", "content")
    return turns_field({name: several}, name, *names)


def with_system(columns: Columns, messages: list[Message]) -> list[Message]:
    """Prepend the row's system prompt unless the turns have one."""
    return messages if messages[0].role == "system" else [*system_turn(columns), *messages]


def completion(columns: Columns, name: str) -> list[Message]:
    """Return the turns of a completion column: the reply, or a dialogue that ends with it."""
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
    """Split turns into prompt and completion; the completion is None if a dialogue ends with a user turn.

    Args:
        prompt: the prompt, if it has its own column.
        completion: the turns of the completion column, with or without the prompt.
        name: the completion column.
    """
    first = next((turn for turn in said if turn.role != "system"), said[0])
    if first.role in REPLIES and not asked:
        raise RowProblem(name, f"a reply without a prompt, {short(first.content)}", A_DIALOGUE)
    every = [*asked, *said] if first.role in REPLIES else list(said)
    return (every[:-1], every[-1]) if every[-1].role in REPLIES else (every, None)


def number(value: Any, field: str, expected: str = "a finite number") -> float:
    """Return a finite number; numbers in text are accepted, for CSV files."""
    try:
        # bool is a subclass of int, but a score of true is a mistake in the data.
        found = nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = nan
    if not isfinite(found):
        raise RowProblem(field, f"found {short(value)}", expected)
    return found


def numbers(value: Any, field: str, count: int, of: str) -> list[float]:
    """Return a list of finite numbers, one for each of the ``count`` entries of column ``of``."""
    if not isinstance(value, list):
        raise RowProblem(field, f"found {short(value)}", "a list of numbers")
    if len(value) != count:
        raise RowProblem(field, f"{len(value)} for {count} {of}", f"one per entry of {of}")
    return [number(entry, f"{field}[{index}]") for index, entry in enumerate(value)]


def listed(columns: Columns, name: str, of: str = "completions") -> list[Any]:
    """Return a column's list, of at least two entries."""
    value = columns[name]
    if not isinstance(value, list):
        raise RowProblem(name, f"found {short(value)}", f"a list of {of}")
    if len(value) < 2:
        raise RowProblem(name, f"a list of {len(value)}", f"at least two {of} to compare")
    return value


def member(entry: Any, name: str, field: str) -> Any:
    """Return a key of a list entry."""
    if not isinstance(entry, dict) or entry.get(name) is None:
        raise RowProblem(field, f"found {short(entry)}", f"an object with '{name}'")
    return entry[name]


def label(value: Any) -> bool:
    """Return whether a completion is labeled good."""
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
    """Return a response's text; numbers and bools (as CSV readers parse them) become text again."""
    return str(value) if isinstance(value, (bool, int, float)) else checked_text(value, field)
