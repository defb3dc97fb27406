"""Parse the fields of preference rows: dialogues, turns, numbers, votes, labels."""

import re
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

from data_templates.hh import ASSISTANT, HUMAN
from data_templates.segments import REPLY_ROLES, Message, Role
from finetune.data.fields import RowError, checked_text, short_repr, text_field
from finetune.data.turns import parse_turns

RowFields = Mapping[str, Any]
SPEAKERS: dict[str, Role] = {HUMAN: "user", ASSISTANT: "assistant"}
SPEAKER = re.compile(f"({re.escape(HUMAN)}|{re.escape(ASSISTANT)})")
DIALOGUE_EXPECTED = r"a dialogue that begins with '\n\nHuman:', a list of turns, or a column with the prompt"
READ_AS_TEXT = "with a number or true/false instead of a completion's text, read as text"

LABELS = {"true": True, "1": True, "good": True, "false": False, "0": False, "bad": False}
"""Label values in lower case: JSON booleans, their CSV forms, and words."""


def is_dialogue(text: str) -> bool:
    """Return whether a text is a dialogue in the layout of Anthropic's HH."""
    return text.startswith(HUMAN)


def parse_dialogue(text: str) -> list[Message]:
    r"""Return the turns of an HH dialogue, stripped of whitespace.

    >>> [turn.content for turn in parse_dialogue("\n\nHuman: Hi\n\nAssistant: Hello.")]
    ['Hi', 'Hello.']
    """
    # A pattern with a group: the speakers are kept, at the odd indices.
    pieces = SPEAKER.split(text)
    return [
        Message(SPEAKERS[speaker], content.strip())
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def prompt_turns(columns: RowFields, name: str) -> list[Message]:
    """Return the turns of a prompt that is a text, an HH dialogue or a list of turns."""
    if not isinstance(columns[name], str):
        return parse_turns(columns[name], name)
    text = text_field(columns, name)
    if not is_dialogue(text):
        return [Message("user", text)]
    dialogue_turns = parse_dialogue(text)
    # HH prompts end in ``Assistant:``, an empty turn where the completion starts.
    ends_open = dialogue_turns[-1].role == "assistant" and not dialogue_turns[-1].content
    return dialogue_turns[:-1] if ends_open else dialogue_turns


def completion_turns(columns: RowFields, name: str) -> list[Message]:
    """Return the turns of a completion column: the reply, or a dialogue that ends with it."""
    value = columns[name]
    if isinstance(value, (list, dict)):
        return parse_turns(value, name)
    if not isinstance(value, str):
        raise RowError(name, f"found {short_repr(value)}", "text, or a list of turns")
    text = checked_text(value, name)
    return parse_dialogue(text) if is_dialogue(text) else [Message("assistant", text)]


def split_completion(
    prompt: Sequence[Message], completion: Sequence[Message], name: str
) -> tuple[list[Message], Message | None]:
    """Split turns into prompt and completion; the completion is None if a dialogue ends with a user turn.

    Args:
        prompt: the prompt, if it has its own column.
        completion: the turns of the completion column, with or without the prompt.
        name: the completion column.
    """
    # A completion column that begins with a user turn holds the prompt too, perhaps without its system turn.
    first = next((turn for turn in completion if turn.role != "system"), completion[0])
    if first.role in REPLY_ROLES and not prompt:
        raise RowError(name, f"a reply without a prompt, {short_repr(first.content)}", DIALOGUE_EXPECTED)
    has_prompt = first.role not in REPLY_ROLES
    system = [turn for turn in prompt[:1] if turn.role == "system" and completion[0].role != "system"]
    conversation = [*(system if has_prompt else prompt), *completion]
    return (
        (conversation[:-1], conversation[-1])
        if conversation[-1].role in REPLY_ROLES
        else (conversation, None)
    )


def is_contained(prompt: Sequence[Message], dialogue: Sequence[Message]) -> bool:
    """Return whether the texts of a prompt column occur in the dialogue that is used in its place."""
    texts = {text.strip() for turn in dialogue for text in (turn.content, turn.context)}
    return all(turn.content.strip() in texts for turn in prompt)


def parse_number(value: Any, field: str, expected: str = "a finite number") -> float:
    """Return a finite number; numbers in text are accepted, for CSV files."""
    try:
        # bool is a subclass of int, but a score of true is a mistake in the data.
        parsed = nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        parsed = nan
    if not isfinite(parsed):
        raise RowError(field, f"found {short_repr(value)}", expected)
    return parsed


def parse_numbers(value: Any, field: str, count: int, of: str) -> list[float]:
    """Return a list of finite numbers, one for each of the ``count`` entries of column ``of``."""
    if not isinstance(value, list):
        raise RowError(field, f"found {short_repr(value)}", "a list of numbers")
    if len(value) != count:
        raise RowError(field, f"{len(value)} for {count} {of}", f"one per entry of {of}")
    return [parse_number(entry, f"{field}[{index}]") for index, entry in enumerate(value)]


def parse_list(columns: RowFields, name: str, of: str = "completions") -> list[Any]:
    """Return a column's list, of at least two entries."""
    value = columns[name]
    if not isinstance(value, list):
        raise RowError(name, f"found {short_repr(value)}", f"a list of {of}")
    if len(value) < 2:
        raise RowError(name, f"a list of {len(value)}", f"at least two {of} to compare")
    return value


def get_member(entry: Any, name: str, field: str) -> Any:
    """Return a key of a list entry."""
    if not isinstance(entry, dict) or entry.get(name) is None:
        raise RowError(field, f"found {short_repr(entry)}", f"an object with '{name}'")
    return entry[name]


def parse_label(value: Any) -> bool:
    """Return whether a completion is labeled good."""
    parsed = LABELS.get(str(value).lower()) if isinstance(value, (bool, int, str)) else None
    if parsed is None:
        raise RowError("label", f"found {short_repr(value)}", "true, 1 or good; false, 0 or bad")
    return parsed


def parse_vote(value: Any, field: str) -> int:
    """Return a vote: 1 or 2 for the better response, 0 for a tie."""
    parsed = parse_number(value, field, "1 or 2 (the better response), or 0 (a tie)")
    if parsed not in (0, 1, 2):
        raise RowError(field, f"found {short_repr(value)}", "1 or 2 (the better response), or 0 (a tie)")
    return int(parsed)


def response_text(value: Any, field: str) -> str:
    """Return a response's text; numbers and bools (as CSV readers parse them) become text again."""
    return str(value) if isinstance(value, (bool, int, float)) else checked_text(value, field)
