"""Choice: which choice a free completion gives, by its label or its text, and whether it is the correct one.

The choices are the row's ``choices``, the correct one its ``expected``: an index, a label or a text. What
counts first is a phrase such as "the answer is (B)" or "정답은 B" (the last such phrase), then a label that
begins the completion, a label in brackets, the text of exactly one choice. A completion without any is wrong.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from finetune.graders._texts import normalized
from finetune.recipe.settings import Section

LETTERS = "ABCDEFGHIJ"
CIRCLED = "①②③④⑤⑥⑦⑧⑨"
_PHRASE = r"(?:answers?|choice|option|정답|답)\s*(?:is|:|은|는|이|가)*\s*:?\s*"
_OPEN, _CLOSE = r"[\s(\[*\"'{]*", r"(?!\w)"


class Options(Section):
    """Options of the search."""

    labels: Literal["letters", "numbers"] = Field(
        "letters", description="letters: A, B, C; numbers: 1, 2, 3, of which an `expected` of 1 is the first"
    )


DEFAULTS = Options()


def choice(completion: str, expected: Any, choices: Any = None, *, options: Options = DEFAULTS) -> bool:
    """Return whether the completion gives the correct choice.

    >>> choice("I think the answer is (B).", "B"), choice("Seoul, of course", 1, ["Busan", "Seoul"])
    (True, True)

    Raises:
        ValueError: the reference answer is none of the choices.
    """
    texts = _choice_texts(choices)
    correct = _correct_index(expected, texts, options)
    return given_choice(completion, texts, labels=options.labels) == correct


def given_choice(
    completion: str, texts: Sequence[str], *, labels: Literal["letters", "numbers"] = "letters"
) -> int | None:
    """Return the index of the choice that a completion gives, None if it gives none or several.

    >>> given_choice("정답은 ② 입니다.", ["서울", "부산"], labels="numbers")
    1
    """
    text = normalized(completion)
    count = len(texts) or len(LETTERS)
    for number, label in enumerate(CIRCLED):
        text = text.replace(label, f"({number + 1})")
    label = f"([1-{min(count, 9)}])" if labels == "numbers" else f"([{LETTERS[:count]}])"
    if labels_given := re.findall(rf"(?i:{_PHRASE}){_OPEN}{label}{_CLOSE}", text):
        return _index(labels_given[-1], labels)
    if match := re.match(rf"{_OPEN}{label}(?:[).:\]*\"'}},]|$)", text):
        return _index(match[1], labels)
    if len(bracketed := set(re.findall(rf"[(\[]{label}[)\]]", text))) == 1:
        return _index(bracketed.pop(), labels)
    return _only_text(text, texts)


def _index(label: str, labels: str) -> int:
    return int(label) - 1 if labels == "numbers" else LETTERS.index(label)


def _only_text(text: str, texts: Sequence[str]) -> int | None:
    """Return the index of the only choice whose text occurs; a text inside of a longer one does not count."""
    remaining, hits = normalized(text, lenient=True), []
    choices = [normalized(choice, lenient=True) for choice in texts]
    for index in sorted(range(len(choices)), key=lambda index: -len(choices[index])):
        if choices[index] and re.search(rf"(?<!\w){re.escape(choices[index])}", remaining):
            hits.append(index)
            remaining = remaining.replace(choices[index], " ")
    return hits[0] if len(hits) == 1 else None


def _choice_texts(choices: Any) -> list[str]:
    # ARC's rows have {text: [...], label: [...]}.
    values = choices.get("text", []) if isinstance(choices, Mapping) else choices
    return [str(value) for value in values or ()]


def _correct_index(expected: Any, texts: Sequence[str], options: Options) -> int:
    numbers = options.labels == "numbers"
    if str(expected) in texts:
        return list(texts).index(str(expected))
    label = str(expected).strip().strip("()")
    if label.isdigit():
        index = int(label) - (1 if numbers else 0)
    else:
        index = LETTERS.find(label.upper()) if len(label) == 1 else -1
    if index < 0 or (texts and index >= len(texts)):
        shown = f"one of {list(texts)}" if texts else "an index, a letter, or the text of a choice"
        raise ValueError(f"the reference answer is {expected!r:.60}, expected {shown}")
    return index
