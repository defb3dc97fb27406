"""Normalized texts, for graders that compare a completion with reference answers."""

import re
import string
import unicodedata
from typing import Any

PUNCTUATION = string.punctuation + "“”‘’…·。、，！？：；「」『』"
_REMOVE_PUNCTUATION = str.maketrans("", "", PUNCTUATION)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str, *, lenient: bool = False) -> str:
    """Return a text in Unicode NFC, with single spaces and none at the ends.

    Args:
        text: the text.
        lenient: also in lowercase, without punctuation and English articles, as SQuAD compares answers
            (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1).

    >>> normalized("  The  Nile. "), normalized("  The  Nile. ", lenient=True)
    ('The Nile.', 'nile')
    """
    text = unicodedata.normalize("NFC", text)
    if lenient:
        text = _ARTICLES.sub(" ", text.lower().translate(_REMOVE_PUNCTUATION))
    return " ".join(text.split())


def reference_answers(expected: Any) -> list[str]:
    """Return the accepted answers: a text or a number, or a list of them."""
    answers = expected if isinstance(expected, list | tuple) else [expected]
    return [str(answer) for answer in answers]
