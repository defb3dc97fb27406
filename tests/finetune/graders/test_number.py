"""Verifiable rewards: extract the last number, compare with the reference answer."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from finetune.graders.number import Options, last_number, number

DATA = Path(__file__).parents[3] / "../shared/data"
SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 72.", "72"),
        ("$1,000.50 in all", "1000.50"),
        ("it fell to -3", "-3"),
        ("48-24", "24"),
        ("(3+4)-5", "5"),
        ("a half is .5", ".5"),
        ("12%, not 13%!", "13"),
        ("1,000,000", "1000000"),
        ("nothing", None),
        ("", None),
    ],
)
def test_last_number(text, value):
    assert last_number(text) == (None if value is None else Decimal(value))


def test_same_number_is_rewarded():
    assert number("so 24 + 48 = 72", SOLUTION) and number("It is $72.00.", SOLUTION) and number("72", 72)
    assert not number("72 or 73", SOLUTION) and not number("", SOLUTION)
    assert number("73", SOLUTION, options=Options(tolerance=1.0))
    with pytest.raises(ValueError, match="no number in the reference answer 'many'"):
        number("3", "many")


@pytest.mark.skipif(not (DATA / "gsm8k/test.jsonl").is_file(), reason="published data is not here")
def test_gsm8k_solutions_match_only_themselves():
    lines = (DATA / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert all(number(answer, answer) for answer in answers)
    agree = sum(number(one, other) for one, other in zip(answers, answers[1:], strict=False))
    assert agree < 0.05 * len(answers)
