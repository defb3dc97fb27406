"""The planner's peak against what the CUDA allocator measured, for random models of several shapes."""

import gc

import pytest
import torch
from gpu_runs import NEEDS_GPU, planned_peak, train_steps

from benchmarks.fake_memory import MemoryCase
from benchmarks.memory import FAMILY_SHAPES, LLAMA_7B, SMALL_SHAPE, with_layers

pytestmark = NEEDS_GPU
MAX_ERROR = 0.1
"""The planner's promise."""
WORKSPACE = 64 * 2**20
"""Bytes of cuBLAS's workspaces, which the allocator holds and the plan does not count."""
LLAMA_4 = with_layers("llama-2-7b", LLAMA_7B, 4)
CASES = [
    MemoryCase("small", SMALL_SHAPE, rows=8, seq_len=1024, predicted=4096),
    MemoryCase(
        "small", SMALL_SHAPE, {"method": "full"}, precision="float32", rows=8, seq_len=512, predicted=2048
    ),
    MemoryCase(*LLAMA_4, rows=4, seq_len=1024, predicted=1024),
    MemoryCase(*LLAMA_4, rows=16, seq_len=1024, predicted=1024, checkpointing=True),
    MemoryCase(
        *with_layers("qwen2-0.5b", FAMILY_SHAPES["qwen2-0.5b"], 4), rows=8, seq_len=512, predicted=2048
    ),
]


def name_of(case: MemoryCase) -> str:
    return f"{case.name}, {case.adapter['method']}, {case.precision}, {case.rows}x{case.seq_len}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_planned_peak_is_the_measured_one(case: MemoryCase) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    losses = train_steps(case, torch.device("cuda"), before_last_step=torch.cuda.reset_peak_memory_stats)
    measured = torch.cuda.max_memory_allocated() - before
    planned = planned_peak(case, "cuda")
    assert all(loss > 0 for loss in losses)
    assert abs(planned - measured) < MAX_ERROR * measured + WORKSPACE, (
        f"planned {planned}, measured {measured}"
    )
