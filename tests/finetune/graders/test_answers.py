"""Verifiable rewards: extract the last number, compare with the reference answer."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from finetune.graders.answers import last_number, same_number

DATA = Path(__file__).parents[3] / "../shared/data"
SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72"


@pytest.mark.parametrize(
    ("text", "number"),
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
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_same_number_is_rewarded():
    assert same_number("", "so 24 + 48 = 72", SOLUTION) and same_number("", "It is $72.00.", SOLUTION)
    assert not same_number("", "72 or 73", SOLUTION) and not same_number("", "", SOLUTION)
    with pytest.raises(ValueError, match="no number in the reference answer 'many'"):
        same_number("", "3", "many")


@pytest.mark.skipif(not (DATA / "gsm8k/test.jsonl").is_file(), reason="published data is not here")
def test_gsm8k_solutions_match_only_themselves():
    lines = (DATA / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert all(same_number("", answer, answer) for answer in answers)
    agree = sum(same_number("", one, other) for one, other in zip(answers, answers[1:], strict=False))
    assert agree < 0.05 * len(answers)
