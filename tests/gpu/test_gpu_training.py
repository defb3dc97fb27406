"""Training on a GPU: 16-bit, 4-bit, the attention kernels, ZeRO-3."""

import importlib.util

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from gpu_runs import NEEDS_GPU, NUM_GPUS, RunSFT, losses
from safetensors.torch import load_file

from finetune.training.loaded_model import load_finished_run

pytestmark = NEEDS_GPU
BFLOAT16_ERROR = 2e-2
"""bfloat16 has 8 bits of mantissa: 0.4 % a number, and a loss of 6 nats averages many."""
HAS_FLASH = importlib.util.find_spec("flash_attn") is not None
KERNELS = [
    pytest.param(
        "flash_attention_2", marks=pytest.mark.skipif(not HAS_FLASH, reason="flash_attn is not installed")
    ),
    "flex_attention",
]


def test_bfloat16_losses_are_those_of_float32(sft: RunSFT) -> None:
    torch.cuda.reset_peak_memory_stats()
    full, half = (sft(precision, model__precision=precision) for precision in ("float32", "bfloat16"))
    assert torch.cuda.max_memory_allocated() > 0, "it trained on the CPU"
    assert len(losses(full)) == 5 and losses(half) == pytest.approx(losses(full), rel=BFLOAT16_ERROR)
    assert losses(half) != losses(full), "autocast did nothing"


def test_qlora_trains_in_nf4_and_reloads(sft: RunSFT) -> None:
    settings = {"adapter__method": "qlora", "train__max_steps": 20, "train__learning_rate": 1e-2}
    result = sft("qlora", model__quantization="nf4", **settings)
    assert losses(result)[-1] < losses(result)[0] - 0.1
    model = load_finished_run(result.directory).model
    stored = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(stored) == 14 and {module.weight.device.type for module in stored} == {"cuda"}
    loaded = {name.replace(".default", ""): weight for name, weight in model.named_parameters()}
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert saved and [n for n, weight in saved.items() if not torch.equal(loaded[n].cpu(), weight)] == []


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_kernels_have_the_losses_of_sdpa(sft: RunSFT, kernel: str, packing: bool) -> None:
    common = {"model__precision": "bfloat16", "data__packing": packing}
    expected = sft("sdpa", model__attention="sdpa", **common)
    found = sft(kernel, model__attention=kernel, **common)
    assert len(losses(found)) == 5 and losses(found) == pytest.approx(losses(expected), rel=BFLOAT16_ERROR)


@pytest.mark.skipif(NUM_GPUS < 2, reason=f"ZeRO-3 shards over two GPUs at least; here are {NUM_GPUS}")
def test_zero3_on_two_gpus_matches_one(sft: RunSFT) -> None:
    pytest.importorskip("deepspeed")
    common = {"model__precision": "float32", "train__max_steps": 2}
    one = sft("one", **common)
    two = sft("two", train__num_processes=2, train__strategy="zero3", **common)
    assert two.record["processes"] == 2
    assert len(losses(two)) == 2 and losses(two) == pytest.approx(losses(one), rel=1e-3)
