"""Planned memory against the real step under FakeTensorMode, for every adapter and loss.

tests/finetune/planner/test_fake_tensors.py compares a few of them in every test run.
"""

import json
from typing import Any

import pytest

from benchmarks.fake_memory import MemoryCase
from benchmarks.memory import (
    ADAPTER_SETTINGS,
    LLAMA_7B,
    NARROW_SHAPES,
    RESULTS_DIR,
    cases,
    compare_case,
    with_layers,
)
from finetune.recipe.discovery import ADAPTERS as FOLDER
from finetune.recipe.discovery import plugin_names

MAX_ERROR = 3.5
"""Percent; the promise is 10. Most cases are below 1; with checkpointing in float32 the plan is 3.1 too high:
PyTorch stops recomputing a layer after its last saved tensor, the plan recomputes all of it."""
NARROW = NARROW_SHAPES["llama"]
WITHOUT_FAKES = {"qlora", "loftq", "pissa"}
"""4-bit kernels and SVDs need data; their adapters are LoRA's."""


def large_errors(*cases_to_compare: MemoryCase) -> dict[str, float]:
    """Return the plans' errors that exceed the tolerance of this test."""
    comparisons = {f"{case}": compare_case(case) for case in cases_to_compare}
    return {
        name: comparison.error
        for name, comparison in comparisons.items()
        if abs(comparison.error) > MAX_ERROR
    }


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["likelihood", "comparison", "scores", "ppo"])
def test_each_loss_with_checkpointing(objective: Any) -> None:
    precisions: tuple[Any, ...] = ("bfloat16", "float32")
    assert not large_errors(
        *(
            MemoryCase(
                "narrow", NARROW, objective=objective, precision=precision, masked=True, checkpointing=True
            )
            for precision in precisions
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", NARROW_SHAPES)
def test_each_family(family: str) -> None:
    config = NARROW_SHAPES[family]
    assert not large_errors(
        MemoryCase(family, config, masked=True), MemoryCase(family, config, {"method": "full"})
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_each_adapter(precision: Any) -> None:
    virtual = ("prefix", "prompt")
    assert not large_errors(
        *(
            MemoryCase(
                "narrow",
                NARROW,
                adapter,
                precision=precision,
                masked=any(word in adapter["method"] for word in virtual),
            )
            for adapter in ADAPTER_SETTINGS
        )
    )


@pytest.mark.slow
def test_logits_in_chunks() -> None:
    """36,000 x 2,000 logits exceed one softmax chunk."""
    assert not large_errors(
        MemoryCase("narrow", NARROW, {"method": "ia3"}, rows=160, seq_len=256, predicted=36_000)
    )


@pytest.mark.slow
def test_width_of_llama_7b() -> None:
    assert not large_errors(
        MemoryCase(*with_layers("llama-2-7b", LLAMA_7B, 4), rows=2, seq_len=512, checkpointing=True)
    )


def test_every_adapter_is_compared() -> None:
    compared_with = {case.adapter["method"] for case in cases(quick=True)}
    assert compared_with | WITHOUT_FAKES == set(plugin_names(FOLDER))


def test_recorded_errors() -> None:
    newest = sorted(RESULTS_DIR.glob("memory-fake-*.json"))[-1]
    comparisons = json.loads(newest.read_text(encoding="utf-8"))["cases"]
    assert len(comparisons) > 100
    assert max(abs(comparison["error"]) for comparison in comparisons) < 5.0
