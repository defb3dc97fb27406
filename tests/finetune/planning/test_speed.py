"""FLOPs, seconds and disk bytes, derived by hand."""

from dataclasses import replace

import pytest

from finetune.planning.architecture import Architecture
from finetune.planning.devices import GPUS, device
from finetune.planning.disk import disk_bytes
from finetune.planning.shapes import base_config
from finetune.planning.speed import (
    drawn_seconds,
    launch_seconds,
    learnt_operations,
    matrix_weights,
    read_operations,
    step_seconds,
)
from finetune.planning.workload import Adapter, Rollout, Workload

LLAMA = Architecture.of(base_config("llama-2-7b"))
STEP = Workload(LLAMA, columns=1024)
A100 = GPUS["a100-80g"]


def test_the_embeddings_are_looked_up_and_the_head_is_multiplied_with() -> None:
    assert matrix_weights(LLAMA) == 6_738_415_616 - 32_000 * 4096 - 65 * 4096


def test_tied_embeddings_are_multiplied_with_all_the_same() -> None:
    qwen = Architecture.of(base_config("qwen3-0.6b"))
    norms = sum(norm.parameters for norm in qwen.norms())
    assert matrix_weights(qwen) == qwen.parameters - norms


def test_a_tower_for_images_costs_a_text_nothing() -> None:
    gemma = Architecture.of(base_config("gemma-3-4b"))
    assert 3.8e9 < matrix_weights(gemma) < 3.9e9 < gemma.parameters


def test_a_token_is_read_with_two_operations_a_weight_and_its_attention() -> None:
    # Attention: 2 L d T with L = 32 layers, d = 4096, T = 1024.
    assert read_operations(STEP) == 2 * matrix_weights(LLAMA) + 2 * 32 * 4096 * 1024


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 2), (True, 3)])
def test_an_adapter_takes_four_operations_a_weight_and_six_with_checkpointing(
    checkpointing: bool, passes: int
) -> None:
    step = replace(STEP, checkpointing=checkpointing)
    assert learnt_operations(step, 1000) == passes * read_operations(STEP) + 2000


def test_full_tuning_takes_six_operations_a_weight() -> None:
    short = replace(STEP, columns=1, adapter=Adapter("full"))
    found = learnt_operations(short, LLAMA.parameters) / matrix_weights(LLAMA)
    assert found == pytest.approx(6, rel=1e-3)


def test_seconds_are_operations_over_what_the_device_reaches() -> None:
    assert step_seconds(STEP, A100, operations=312e12) == (1 / 0.79, 1 / 0.21)
    both = replace(STEP, processes=2, strategy="ddp")
    assert step_seconds(both, A100, operations=312e12) == (0.5 / 0.79, pytest.approx(0.75 / 0.21))
    stored = replace(STEP, quantization="nf4")
    assert step_seconds(stored, A100, operations=312e12) == (
        pytest.approx(1.2 / 0.79),
        pytest.approx(1.6 / 0.21),
    )


def test_a_thousand_short_passes_take_as_long_as_litgpt_says() -> None:
    # tutorials/resource-tables.md: 7B with LoRA, Alpaca (about 110 tokens a row), batch size 1: 2.36 minutes.
    short = replace(STEP, columns=110)
    computed = step_seconds(short, GPUS["a100-40g"], operations=110_000 * learnt_operations(short, 4_194_304))
    launched = launch_seconds(short, passes=1000)
    assert computed is not None
    assert max(computed[0], launched[0]) < 2.36 * 60 < computed[1] + launched[1]
    assert launch_seconds(replace(short, device="cpu"), passes=1000) == (0.0, 0.0)


def test_an_8b_on_a_4090_is_as_fast_as_torchtune_says() -> None:
    eight = Workload(Architecture.of(base_config("llama-3.1-8b")), lines=2, columns=2048, checkpointing=True)
    took = step_seconds(eight, GPUS["rtx4090"], operations=learnt_operations(eight, 10_000_000))
    assert took is not None and took[0] < 1 / 3083 < took[1]


def test_a_card_known_by_its_size_has_no_speed() -> None:
    unknown = device("24GB")
    drawing = replace(STEP, rollout=Rollout(8, 128, 64))
    assert step_seconds(STEP, unknown, operations=1.0) is None
    assert drawn_seconds(drawing, unknown, replies=8, base_bytes=1) is None


def test_drawing_reads_the_weights_for_every_token() -> None:
    drawing = replace(STEP, columns=192, rollout=Rollout(1, 128, 64))
    found = drawn_seconds(drawing, A100, replies=10, base_bytes=13_476_831_232)
    assert found is not None
    # litgpt's table: 31 tokens/s of 7B in bfloat16 on an A100.
    assert found[0] < 10 * 64 / 31 < found[1]


def test_the_disk_holds_adapter_checkpoints_and_a_merged_model() -> None:
    assert disk_bytes(STEP, trained=100, kept=2) == {
        "adapter": 400,
        "checkpoints": 3 * (400 + 800),
        "merged model, if requested": 2 * 6_738_415_616,
    }
    whole = replace(STEP, adapter=Adapter("full"))
    assert set(disk_bytes(whole, trained=LLAMA.parameters, kept=2)) == {"model", "checkpoints"}
