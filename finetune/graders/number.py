"""Number: the last number of the completion equals the last number of the reference answer (GSM8K)."""

import re
from decimal import Decimal
from typing import Any

from pydantic import Field

from finetune.recipe.settings import Section

NUMBER_PATTERN = re.compile(r"(?:(?<![\d)])-)?(?:\d[\d,]*)?\.?\d+")
"""A minus after a digit or a closing bracket is subtraction, not a sign."""


class Options(Section):
    """Options of the comparison."""

    tolerance: float = Field(0.0, ge=0, description="largest accepted difference")


DEFAULTS = Options()


def number(completion: str, expected: Any, *, options: Options = DEFAULTS) -> bool:
    r"""Return whether the last numbers of completion and reference answer are equal.

    GSM8K solutions are compared like this (Cobbe et al. 2021, arXiv 2110.14168: they end with ``#### 72``),
    but the marker is not required here: 72, $72.00 and "72." are equal, 1,000 is 1000.

    >>> number("48 + 24 = 72 clips.", "48+24 = <<48+24=72>>72 clips.\n#### 72")
    True

    Raises:
        ValueError: the reference answer has no number.
    """
    reference = last_number(str(expected))
    if reference is None:
        raise ValueError(f"no number in the reference answer {str(expected)[:80]!r}")
    value = last_number(completion)
    return value is not None and abs(value - reference) <= Decimal(str(options.tolerance))


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None.

    >>> last_number("It costs $1,000.50."), last_number("none")
    (Decimal('1000.50'), None)
    """
    numbers = NUMBER_PATTERN.findall(text)
    # Decimal and not float: 0.1 is exact, and 72.00 equals 72.
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
