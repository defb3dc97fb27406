"""Contains: the reference answer occurs in the completion.

Both are in Unicode NFC, each run of spaces and line breaks as one space, in lowercase. A list of reference
answers accepts each, or with ``all`` requires all of them.
"""

import re
from typing import Any

from pydantic import Field

from finetune.graders._texts import normalized, reference_answers
from finetune.recipe.settings import Section


class Options(Section):
    """Options of the search."""

    case_sensitive: bool = Field(False, description="true: compare upper and lower case")
    words: bool = Field(
        False,
        description="true: complete words only; not for languages that write particles onto the word",
    )
    all: bool = Field(False, description="true: all of several reference answers, not one of them")


DEFAULTS = Options()


def contains(completion: str, expected: Any, *, options: Options = DEFAULTS) -> bool:
    """Return whether a reference answer occurs in the completion.

    >>> contains("It is the Nile.", "nile"), contains("juvenile", "nile", options=Options(words=True))
    (True, False)
    """
    hits = (
        _occurs(normalized(answer), normalized(completion), options) for answer in reference_answers(expected)
    )
    return all(hits) if options.all else any(hits)


def _occurs(answer: str, text: str, options: Options) -> bool:
    pattern = rf"(?<!\w){re.escape(answer)}(?!\w)" if options.words else re.escape(answer)
    return re.search(pattern, text, 0 if options.case_sensitive else re.IGNORECASE) is not None
