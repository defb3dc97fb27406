"""The planner's door: memory, parameters, disk bytes and time of a run from its workload."""

from dataclasses import replace

import pytest

from finetune.distributed.hardware import GPUS, device_by_name
from finetune.planner.estimate import Estimate, GenerationBatch, TotalWork, Workload, estimate
from finetune.planner.from_recipe import load_architecture
from finetune.planner.memory import plan_memory
from finetune.planner.workload import Adapter
from finetune.recipe.settings import ModelSettings

STEP = Workload(load_architecture(ModelSettings(base="llama-2-7b")), seq_len=1024)
PARAMETERS = 6_738_415_616
LORA = 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
"""Parameters of rank 16 on the seven linear layers of 32 layers."""
A100 = GPUS["a100-80g"]


def test_memory_and_parameters() -> None:
    estimated = estimate(STEP)
    assert estimated.phases == plan_memory(STEP)
    assert (estimated.trainable, estimated.total) == (LORA, PARAMETERS + LORA)
    assert estimated.base_bytes == 2 * PARAMETERS
    full = estimate(replace(STEP, adapter=Adapter("full")))
    assert full.trainable == full.total == PARAMETERS and full.merge is None


def test_the_merge_is_not_a_phase_of_the_run() -> None:
    estimated = estimate(replace(STEP, quantization="nf4", rows=1, seq_len=16, predicted=16))
    assert estimated.merge is not None and estimated.merge not in estimated.run_phases
    assert estimated.peak.total < estimated.merge.total


def test_the_micro_batch_s_peak_leaves_generation_out() -> None:
    generating = estimate(replace(STEP, rollout=GenerationBatch(512, 512, 512)))
    assert generating.peak.name == "rollout" != generating.micro_batch_peak.name
    # Keys and values of 32 layers, 4096 wide, in bfloat16.
    assert generating.kv_cache_bytes == 512 * 1024 * 2 * 32 * 4096 * 2


def test_ppo_trains_two_adapters_and_a_value_head() -> None:
    assert estimate(replace(STEP, objective="ppo", heads=1)).trainable == 2 * (LORA + 4096)


def test_disk_bytes() -> None:
    assert Estimate(STEP, (), trainable=100).disk_bytes(2) == {
        "adapter": 400,
        "checkpoints": 3 * (400 + 800),
        "merged model, if requested": 2 * PARAMETERS,
    }
    full = replace(STEP, adapter=Adapter("full"))
    assert set(Estimate(full, (), trainable=PARAMETERS).disk_bytes(2)) == {"model", "checkpoints"}


def test_time_needs_a_known_device() -> None:
    estimated, work = estimate(STEP), TotalWork(steps=10, trained_tokens=10_240.0)
    assert estimated.time(device_by_name("24GB"), work) is None
    time = estimated.time(A100, work)
    assert time is not None and 0 < time.lower < time.upper
    assert time.basis.startswith("estimated: 21% to 79% of this device's peak of 312 TFLOP/s")


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({"checkpointing": True}, 1.5), ({"quantization": "nf4"}, 1.4), ({"strategy": "zero3"}, 1.25)],
)
def test_seconds_per_token_of_changed_settings(changes: dict[str, object], factor: float) -> None:
    changed = estimate(replace(STEP, **changes))
    ratio = changed.seconds_per_token(A100, None) / estimate(STEP).seconds_per_token(A100, None)
    assert ratio == pytest.approx(factor, rel=0.01)
