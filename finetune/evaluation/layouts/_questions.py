"""Prompts of multiple-choice questions in English and Korean, and columns that files keep as text."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_templates.segments import Message
from finetune.data.fields import RowError, short_repr

LETTERS = "ABCDEFGHIJ"
HANGUL = re.compile("[가-힣]")


def question_prompt(question: str, choices: Sequence[str] = ()) -> tuple[Message, ...]:
    """Return the prompt of a question in its language: the question, its lettered choices, "Answer:"."""
    korean = HANGUL.search(question)
    lines = [f"{'질문' if korean else 'Question'}: {question.strip()}"]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return (Message("user", "\n".join([*lines, "정답:" if korean else "Answer:"])),)


def text_list(columns: Mapping[str, Any], name: str) -> list[str]:
    """Return a column of two or more texts: a list, or the list that a cell of a table has as text.

    Raises:
        RowError: it is something else.
    """
    value = columns.get(name)
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < 2:
        raise RowError(name, f"found {short_repr(columns.get(name))}", "a list of two or more texts")
    return [str(text) for text in value]


def _parsed(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return None
