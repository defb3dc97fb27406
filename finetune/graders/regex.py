"""Regex: a regular expression matches the completion, or finds the reference answer in it.

The pattern is an option, else the column ``pattern`` of the row, else the reference answer.
"""

import re
from typing import Any

from pydantic import Field, field_validator

from finetune.graders._texts import normalized, reference_answers
from finetune.recipe.settings import Section


class Options(Section):
    """Options of the match."""

    pattern: str | None = Field(
        None, description="regular expression of Python; null: the row's `pattern`, or its reference answer"
    )
    full: bool = Field(False, description="true: the complete text must match, without spaces at the ends")
    ignore_case: bool = Field(False, description="true: ignore case")
    compare: bool = Field(
        False, description="true: the last match's first group must equal the reference answer"
    )

    @field_validator("pattern")
    @classmethod
    def _is_valid(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"no regular expression: {error}") from error
        return pattern


DEFAULTS = Options()


def regex(
    completion: str, pattern: str | None = None, expected: Any = None, *, options: Options = DEFAULTS
) -> bool:
    r"""Return whether the pattern matches, and with ``compare`` whether its group is a reference answer.

    >>> regex("The answer is 12.", options=Options(pattern=r"answer is \d+"))
    True
    >>> regex("A or B? Answer: B", expected="B", options=Options(pattern=r"Answer: (\w)", compare=True))
    True

    Raises:
        ValueError: there is neither a pattern nor a reference answer, or the pattern has no group to compare.
    """
    text = options.pattern or pattern or (None if expected is None or options.compare else str(expected))
    if text is None:
        raise ValueError("no pattern: give the option `pattern`, a column `pattern`, or a reference answer")
    compiled = re.compile(text, re.DOTALL | (re.IGNORECASE if options.ignore_case else 0))
    if options.full:
        matches = [match for match in [compiled.fullmatch(completion.strip())] if match]
    else:
        matches = list(compiled.finditer(completion))
    if not matches or not options.compare:
        return bool(matches)
    if expected is None or not compiled.groups:
        raise ValueError("`compare` needs a reference answer, and a pattern with a group such as (\\d+)")
    group = normalized(matches[-1][1] or "")
    return group in [normalized(answer) for answer in reference_answers(expected)]
