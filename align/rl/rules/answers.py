"""Whether a reply has the right answer: rewards for data whose rows say what is right."""

import re
from decimal import Decimal

NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d[\d,]*)?\.?\d+")
"""A minus behind a number or a bracket takes away."""


def same_number(prompt: str, completion: str, expected: str) -> bool:
    r"""Tell whether the last number of a reply is the last number of the row's own reply.

    As GSM8K's solutions are compared (Cobbe et al. 2021, arXiv 2110.14168: ``#### 72`` at their end), but
    without asking for the mark: 72, $72.00 and "72." are the same, 1,000 is 1000.

    >>> same_number("", "48 + 24 = 72 clips.", "48+24 = <<48+24=72>>72 clips.\n#### 72")
    True

    Raises:
        ValueError: the row's own reply has no number.
    """
    wanted = last_number(expected)
    if wanted is None:
        raise ValueError(f"no number in the row's own reply, {expected[:80]!r}")
    return last_number(completion) == wanted


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, None where it has none.

    >>> last_number("It costs $1,000.50."), last_number("none")
    (Decimal('1000.50'), None)
    """
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
