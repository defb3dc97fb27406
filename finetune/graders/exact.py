"""Exact match: the completion equals the reference answer.

Both are compared in Unicode NFC, without spaces at the ends, each run of spaces and line breaks as one space.
``lenient`` also ignores case, punctuation and English articles. A list of reference answers accepts each.
"""

from typing import Any

from pydantic import Field

from finetune.graders._texts import normalized, reference_answers
from finetune.recipe.settings import Section


class Options(Section):
    """Options of exact match."""

    lenient: bool = Field(
        False, description="true: ignore case, punctuation and the articles a, an, the, as SQuAD does"
    )


DEFAULTS = Options()


def exact(completion: str, expected: Any, *, options: Options = DEFAULTS) -> bool:
    r"""Return whether the completion equals a reference answer.

    >>> exact(" 사과 \n", "사과"), exact("The Nile.", "Nile"), exact("b", ["a", "b"])
    (True, False, True)
    """
    text = normalized(completion, lenient=options.lenient)
    return any(text == normalized(answer, lenient=options.lenient) for answer in reference_answers(expected))
