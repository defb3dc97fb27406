"""What the GPU tests are made of, on the CPU: their runs, random steps, and the plans of their shapes."""

import math

import pytest
import torch
from gpu_runs import RunSFT, losses, planned_peak, train_steps
from test_gpu_memory import CASES

from benchmarks.fake_memory import MemoryCase
from benchmarks.memory import NARROW_SHAPES


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_training.py compares on the GPU")
def test_eager_attention_has_the_losses_of_sdpa(sft: RunSFT) -> None:
    common = {"model__precision": "float32", "train__max_steps": 2}
    sdpa, eager = (sft(kernel, model__attention=kernel, **common) for kernel in ("sdpa", "eager"))
    assert len(losses(sdpa)) == 2 and losses(eager) == pytest.approx(losses(sdpa), rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_random_steps_start_from_chance(method: str, checkpointing: bool, precision: str) -> None:
    case = MemoryCase(
        "narrow",
        NARROW_SHAPES["llama"],
        {"method": method},
        precision=precision,  # type: ignore[arg-type]
        rows=2,
        seq_len=12,
        predicted=10,
        checkpointing=checkpointing,
    )
    calls = []
    first, second = train_steps(case, torch.device("cpu"), before_last_step=lambda: calls.append("reset"))
    assert calls == ["reset"]
    assert first == pytest.approx(math.log(2000), abs=0.3)
    # A LoRA of zeros is nothing but its dropout after one small step.
    assert second < first - 0.01 if method == "full" else second == pytest.approx(first, abs=0.05)


def test_checkpointed_steps_are_planned_smaller() -> None:
    kept, recomputed = (
        planned_peak(MemoryCase("narrow", NARROW_SHAPES["llama"], checkpointing=on), "cuda")
        for on in (False, True)
    )
    assert 0 < recomputed < 0.8 * kept


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shapes_of_the_gpu_tests_fit_24_gb_and_dwarf_the_workspaces(case: MemoryCase) -> None:
    assert 2**30 < planned_peak(case, "cuda") < 20 * 2**30
