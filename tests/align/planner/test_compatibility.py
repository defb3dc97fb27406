"""The compatibility tables and the page generated from them."""

import pytest

import align.planner.compatibility as matrix
from finetune.distributed.solver import Combination, check, solver_rules
from finetune.distributed.strategies import STRATEGIES
from finetune.recipe.discovery import ADAPTERS, adapter_traits, plugin_names, stage_names
from tools.docs.compatibility import all_tables


def test_page_lists_every_stage_and_rule() -> None:
    page = all_tables()
    for stage in stage_names():
        assert page.count(f" {stage}") >= 2, stage
    for rule in solver_rules():
        assert f"* **{rule.name}**: {rule.describe()}" in page


@pytest.mark.parametrize("device", matrix.DEVICE_KINDS)
def test_equal_rows_are_merged_and_none_is_lost(device: str) -> None:
    rows = matrix.adapter_rows("sft", device)
    labels = [label for row in rows for label in row.labels]
    storages = [adapter_traits(name).quantization for name in plugin_names(ADAPTERS)]
    assert len(labels) == len(set(labels)) == sum(map(len, storages)) > 60
    assert len(rows) < 15
    assert all(len(row.verdicts) == len(STRATEGIES) for row in rows)


def test_row_labels() -> None:
    assert matrix.row_label(("lora none", "lora nf4", "full none")) == "none/nf4: lora; none: full"
    assert matrix.row_label(("adamw", "adafactor")) == "adamw, adafactor"


def test_cells_name_the_changes() -> None:
    fsdp2 = Combination(strategy="fsdp2", processes=2, adapter="qlora")
    assert matrix.format_cell(check(Combination())) == "yes"
    assert matrix.format_cell(check(fsdp2)) == "zero3 [fsdp2-quantized]"
    assert (
        matrix.format_cell(check(Combination(stage="reward", adapter="llama_adapter"))) == "no [reward-head]"
    )
