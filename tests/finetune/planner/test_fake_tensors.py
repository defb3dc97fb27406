"""The planner's oracle: the real training step on fake tensors, for every family, kind of adapter and loss.

tests/benchmarks/test_memory_benchmarks.py (slow) and ``python -m benchmarks.memory`` compare all the others.
"""

from typing import Any

import pytest

from benchmarks.fake_memory import MemoryCase
from benchmarks.memory import NARROW_SHAPES, compare_case

MAX_ERROR = 2.0
"""Percent. DoRA's is 1.7 (temporaries of its norms), checkpointing's 1.2; the others are below 0.7."""
LLAMA = NARROW_SHAPES["llama"]


def error(*arguments: Any, **options: Any) -> float:
    """Return the plan's error in percent of the measured bytes."""
    return abs(compare_case(MemoryCase("narrow", *arguments, **options)).error)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", NARROW_SHAPES)
def test_families(family: str, method: str) -> None:
    assert error(NARROW_SHAPES[family], {"method": method}) < MAX_ERROR


@pytest.mark.parametrize("method", ["prefix", "prompt", "dora", "ia3", "bottleneck"])
def test_adapters(method: str) -> None:
    assert error(LLAMA, {"method": method}) < MAX_ERROR


@pytest.mark.parametrize("objective", ["comparison", "scores", "ppo"])
def test_losses(objective: str) -> None:
    assert error(LLAMA, objective=objective, masked=True) < MAX_ERROR


def test_checkpointing_accumulation_and_float32() -> None:
    assert error(LLAMA, checkpointing=True) < MAX_ERROR
    assert error(LLAMA, {"method": "full"}, accumulation_steps=2) < MAX_ERROR
    assert error(LLAMA, precision="float32") < MAX_ERROR


def test_trained_tokens_of_a_tied_head() -> None:
    """PEFT copies the embeddings twice: for the input, and for the head that shares them."""
    tied = LLAMA | {"tie_word_embeddings": True, "vocab_size": 20_000}
    for options in ({}, {"objective": "comparison", "masked": True}, {"precision": "float32"}):
        assert error(tied, {"method": "trainable_tokens", "tokens": [1, 2]}, **options) < 0.3
