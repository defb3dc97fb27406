"""What rows of published layouts mean in every stage: nothing of a row is lost in silence."""

import pytest
from column_cases import COLUMN_CASES
from row_reading import Case, read
from turn_cases import TURN_CASES

from finetune.data.fields import RowError

KINDS = {**TURN_CASES, **COLUMN_CASES}
FURTHER = [
    pytest.param(case, id=f"{kind} {index}")
    for kind, cases in KINDS.items()
    for index, case in enumerate(cases[1:], 1)
]


def check(case: Case) -> None:
    stage, row, expected = case
    if isinstance(expected, str):
        with pytest.raises(RowError) as caught:
            read(stage, row)
        assert str(caught.value).startswith(expected)
        return
    assert read(stage, row)[0] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_each_kind(kind: str) -> None:
    check(KINDS[kind][0])
    assert len(KINDS[kind]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("case", FURTHER)
def test_further_rows_of_each_kind(case: Case) -> None:
    check(case)
