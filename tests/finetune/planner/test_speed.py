"""FLOPs and seconds, derived by hand."""

from dataclasses import replace

import pytest

from finetune.distributed.hardware import GPUS, cpu_device, device_by_name
from finetune.planner.architecture import Architecture
from finetune.planner.speed import (
    compute_seconds,
    forward_flops,
    generation_seconds,
    launch_seconds,
    matmul_weights,
    training_flops,
)
from finetune.planner.workload import Adapter, GenerationBatch, Workload
from finetune.recipe.base_config import load_base_config

LLAMA = Architecture.from_config(load_base_config("llama-2-7b"))
STEP = Workload(LLAMA, seq_len=1024)
A100 = GPUS["a100-80g"]


def test_matmul_weights_exclude_embeddings_and_include_the_head() -> None:
    assert matmul_weights(LLAMA) == 6_738_415_616 - 32_000 * 4096 - 65 * 4096


def test_tied_embeddings_count_as_head() -> None:
    qwen = Architecture.from_config(load_base_config("qwen3-0.6b"))
    norms = sum(norm.parameters for norm in qwen.norms())
    assert matmul_weights(qwen) == qwen.parameters - norms


def test_vision_tower_costs_text_nothing() -> None:
    gemma = Architecture.from_config(load_base_config("gemma-3-4b"))
    assert 3.8e9 < matmul_weights(gemma) < 3.9e9 < gemma.parameters


def test_forward_flops_are_two_per_weight_plus_attention() -> None:
    # Attention: 2 L d T with L = 32 layers, d = 4096, T = 1024.
    assert forward_flops(STEP) == 2 * matmul_weights(LLAMA) + 2 * 32 * 4096 * 1024


@pytest.mark.parametrize(("checkpointing", "forward_units"), [(False, 2), (True, 3)])
def test_adapter_training_flops_with_and_without_checkpointing(
    checkpointing: bool, forward_units: int
) -> None:
    step = replace(STEP, checkpointing=checkpointing)
    assert training_flops(step, 1000) == forward_units * forward_flops(STEP) + 2000


def test_full_finetuning_takes_six_flops_per_weight() -> None:
    short = replace(STEP, seq_len=1, adapter=Adapter("full"))
    flops_per_weight = training_flops(short, LLAMA.parameters) / matmul_weights(LLAMA)
    assert flops_per_weight == pytest.approx(6, rel=1e-3)


def test_compute_seconds_are_flops_over_throughput() -> None:
    assert compute_seconds(STEP, A100, flops=312e12) == (1 / 0.79, 1 / 0.21)
    two_processes = replace(STEP, processes=2, strategy="ddp")
    assert compute_seconds(two_processes, A100, flops=312e12) == (0.5 / 0.79, pytest.approx(0.75 / 0.21))
    quantized = replace(STEP, quantization="nf4")
    assert compute_seconds(quantized, A100, flops=312e12) == (
        pytest.approx(1.2 / 0.79),
        pytest.approx(1.6 / 0.21),
    )


def test_processes_share_the_cpu() -> None:
    cpu = cpu_device()
    one = replace(STEP, device="cpu", precision="float32")
    two = replace(one, processes=2, strategy="ddp")
    first, second = (compute_seconds(step, cpu, flops=1e12) for step in (one, two))
    assert first is not None and second == (first[0], pytest.approx(1.5 * first[1]))
    rollout = GenerationBatch(rows=8, prompt=64, completion=32)
    generated = [
        generation_seconds(replace(step, rollout=rollout), cpu, completions=64, base_bytes=10**9)
        for step in (one, two)
    ]
    assert generated[0] is not None and generated[0] == generated[1]


def test_short_passes_match_litgpt() -> None:
    # tutorials/resource-tables.md: 7B with LoRA, Alpaca (about 110 tokens a row), batch size 1: 2.36 minutes.
    short = replace(STEP, seq_len=110)
    computed = compute_seconds(short, GPUS["a100-40g"], flops=110_000 * training_flops(short, 4_194_304))
    launched = launch_seconds(short, micro_batches=1000)
    assert computed is not None
    assert max(computed[0], launched[0]) < 2.36 * 60 < computed[1] + launched[1]
    assert launch_seconds(replace(short, device="cpu"), micro_batches=1000) == (0.0, 0.0)


def test_8b_on_a_4090_matches_torchtune() -> None:
    llama_8b = Workload(
        Architecture.from_config(load_base_config("llama-3.1-8b")), rows=2, seq_len=2048, checkpointing=True
    )
    seconds = compute_seconds(llama_8b, GPUS["rtx4090"], flops=training_flops(llama_8b, 10_000_000))
    assert seconds is not None and seconds[0] < 1 / 3083 < seconds[1]


def test_a_gpu_given_by_size_has_no_speed() -> None:
    unknown = device_by_name("24GB")
    generating = replace(STEP, rollout=GenerationBatch(8, 128, 64))
    assert compute_seconds(STEP, unknown, flops=1.0) is None
    assert generation_seconds(generating, unknown, completions=8, base_bytes=1) is None


def test_decoding_reads_the_weights_for_every_token() -> None:
    generating = replace(STEP, seq_len=192, rollout=GenerationBatch(1, 128, 64))
    seconds = generation_seconds(generating, A100, completions=10, base_bytes=13_476_831_232)
    assert seconds is not None
    # litgpt's table: 31 tokens/s of 7B in bfloat16 on an A100.
    assert seconds[0] < 10 * 64 / 31 < seconds[1]
