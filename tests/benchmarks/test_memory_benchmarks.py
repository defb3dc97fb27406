"""Planned memory against the real step under FakeTensorMode, for every adapter and loss."""

import json
from typing import Any

import pytest

from benchmarks.fake_memory import Case
from benchmarks.memory import ADAPTERS, LLAMA_7B, RESULTS, cases, compared, cut, shape
from finetune.recipe.discovery import ADAPTERS as FOLDER
from finetune.recipe.discovery import plugin_names

MOST = 3.0
"""Percent; the promise is 10."""
NARROW = shape("llama", 256, 704, 2, heads=4, num_key_value_heads=2, vocab_size=2000)
OTHERS = {
    "qwen3": shape("qwen3", 256, 768, 2, heads=4, num_key_value_heads=2, head_dim=128, vocab_size=2000),
    "gemma2": shape("gemma2", 256, 768, 2, heads=2, num_key_value_heads=1, head_dim=128, vocab_size=2000),
    "gemma3": shape("gemma3_text", 256, 768, 2, heads=2, num_key_value_heads=1, head_dim=128)
    | {"vocab_size": 2000},
    "gpt_neox": shape("gpt_neox", 256, 1024, 2, heads=4, vocab_size=2000),
}
WITHOUT_FAKES = {"qlora", "loftq", "pissa"}
"""4-bit kernels and SVDs need data; their adapters are LoRA's."""


def errors(*asked: Case) -> dict[str, float]:
    """Return the plans' errors that exceed the tolerance of this test."""
    lines = {f"{case}": compared(case) for case in asked}
    return {name: line.error for name, line in lines.items() if abs(line.error) > MOST}


@pytest.mark.parametrize("objective", ["likelihood", "comparison", "scores", "ppo"])
def test_each_loss(objective: Any) -> None:
    assert not errors(Case("narrow", NARROW, objective=objective, masked=True))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["likelihood", "comparison", "scores", "ppo"])
def test_each_loss_computed_again(objective: Any) -> None:
    ways: tuple[Any, ...] = ("bfloat16", "float32")
    assert not errors(
        *(
            Case("narrow", NARROW, objective=objective, precision=way, masked=True, checkpointing=True)
            for way in ways
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_each_family(family: str) -> None:
    config = OTHERS[family]
    assert not errors(Case(family, config, masked=True), Case(family, config, {"method": "full"}))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_each_adapter(precision: Any) -> None:
    virtual = ("prefix", "prompt")
    assert not errors(
        *(
            Case(
                "narrow",
                NARROW,
                adapter,
                precision=precision,
                masked=any(word in adapter["method"] for word in virtual),
            )
            for adapter in ADAPTERS
        )
    )


def test_lora_full_and_prompts() -> None:
    assert not errors(
        Case("narrow", NARROW, checkpointing=True),
        Case("narrow", NARROW, {"method": "full"}, accumulated=2),
        Case("narrow", NARROW, {"method": "prefix"}, masked=True),
        Case("narrow", NARROW, {"method": "dora"}, precision="float32"),
    )


@pytest.mark.slow
def test_logits_in_chunks() -> None:
    """36,000 x 2,000 logits exceed one softmax chunk."""
    assert not errors(Case("narrow", NARROW, {"method": "ia3"}, lines=160, columns=256, predicted=36_000))


@pytest.mark.slow
def test_the_width_of_seven_billion_parameters() -> None:
    assert not errors(Case(*cut("llama-2-7b", LLAMA_7B, 4), lines=2, columns=512, checkpointing=True))


def test_every_adapter_is_compared() -> None:
    compared_with = {case.adapter["method"] for case in cases(quick=True)}
    assert compared_with | WITHOUT_FAKES == set(plugin_names(FOLDER))


def test_written_errors_are_as_promised() -> None:
    newest = sorted(RESULTS.glob("memory-fake-*.json"))[-1]
    lines = json.loads(newest.read_text(encoding="utf-8"))["cases"]
    assert len(lines) > 100
    assert max(abs(line["error"]) for line in lines) < 5.0
