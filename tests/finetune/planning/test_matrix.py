"""The compatibility tables and the page generated from them."""

from pathlib import Path

import pytest

import finetune.planning.matrix as matrix
from finetune.planning.compatibility import RULES
from finetune.planning.solver import STRATEGIES, Combination, judge
from finetune.recipe.discovery import stage_names

PAGE = Path(matrix.__file__).with_name("COMPATIBILITY.md")


def test_the_page_is_up_to_date() -> None:
    repair = "python -m finetune.planning.compatibility_page > finetune/planning/COMPATIBILITY.md"
    assert PAGE.read_text(encoding="utf-8") == matrix.page(), repair


def test_the_page_names_every_stage_and_explains_every_rule() -> None:
    page = matrix.page()
    for stage in stage_names():
        assert page.count(f" {stage}") >= 2, stage
    for rule in RULES:
        assert f"* **{rule.name}**: {rule.reason}" in page


@pytest.mark.parametrize("device", matrix.DEVICES)
def test_equal_rows_stand_together_and_none_is_lost(device: str) -> None:
    rows = matrix.adapter_rows("sft", device)
    names = [name for row in rows for name in row.names]
    assert len(names) == len(set(names)) == 67
    assert len(rows) < 15
    assert all(len(row.verdicts) == len(STRATEGIES) for row in rows)


def test_rows_are_named_by_adapter() -> None:
    assert matrix.row_name(("lora none", "lora nf4", "full none")) == "none/nf4: lora; none: full"
    assert matrix.row_name(("adamw", "adafactor")) == "adamw, adafactor"


def test_cells_say_what_to_change() -> None:
    fsdp2 = Combination(strategy="fsdp2", processes=2, adapter="qlora")
    assert matrix.cell_text(judge(Combination())) == "yes"
    assert matrix.cell_text(judge(fsdp2)) == "zero3 [fsdp2-quantized]"
    assert matrix.cell_text(judge(Combination(stage="reward", adapter="llama_adapter"))) == "no [reward-head]"
