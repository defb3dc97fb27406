"""Resolve ``micro_batch_size: auto`` on a GPU: does a batch of N rows fit, by the memory plan?"""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import torch

from finetune.planner.devices import GIB, SAFE_FRACTION
from finetune.planner.from_recipe import base_workload, load_architecture
from finetune.planner.memory import peak_phase, plan_memory
from finetune.planner.workload import ObjectiveKind, Workload
from finetune.recipe.errors import UserError
from finetune.recipe.settings import StageSettings
from finetune.training.model import Policy

# Their memory does not depend on the micro-batch size.
PHASES_WITHOUT_BATCH = ("merge", "rollout")
OBJECTIVE_OF_CONFIG: dict[str, ObjectiveKind] = {
    "SFTConfig": "likelihood",
    "DPOConfig": "comparison",
    "KTOConfig": "comparison",
    "RLOOConfig": "comparison",
    "GRPOConfig": "comparison",
    "RewardConfig": "scores",
}
"""The planner's objective (loss on the last hidden states) of a stage, by its TRL config; TRL has no PPO."""


def batch_fits(
    settings: StageSettings,
    policy: Policy,
    *,
    longest: int,
    num_processes: int,
    strategy: str,
    gpu_bytes: int,
) -> Callable[[int], bool] | None:
    """Return a predicate: do N rows fit the GPU? None if there is no plan for this architecture.

    Args:
        settings: the recipe's sections.
        policy: the model that is trained, loaded already.
        longest: tokens of the longest row; all of them are assumed to be predicted.
        num_processes: number of processes.
        strategy: distributed strategy.
        gpu_bytes: bytes available on a GPU.
    """
    try:
        architecture = load_architecture(settings.model)
    # The planner does not know this architecture; the run itself may still.
    except UserError:
        return None
    workload = base_workload(
        settings,
        architecture,
        precision=policy.precision,
        quantization=policy.quantization,
        device="cuda",
    )
    workload = replace(workload, processes=num_processes, strategy=strategy, offload=settings.train.offload)  # type: ignore[arg-type]
    return lambda rows: _peak_bytes(settings, workload, rows, longest) <= SAFE_FRACTION * gpu_bytes


def free_gpu_bytes() -> int:
    """Return the GPU memory available to this process, free or reserved by it, rounded down to full GiB."""
    # Rounded, so that the same command resolves to the same micro-batch size when a little more is free.
    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved()) // GIB * GIB


def _peak_bytes(settings: StageSettings, workload: Workload, rows: int, longest: int) -> int:
    objective: ObjectiveKind = "ppo" if "ppo" in dict(settings) else OBJECTIVE_OF_CONFIG[settings.TRL_CONFIG]
    batch_workload = replace(
        workload,
        objective=objective,
        rows=rows,
        seq_len=longest,
        predicted=rows * longest,
        completions=2 * rows if objective != "likelihood" else 0,
        heads=1 if objective in ("scores", "ppo") else 0,
        masked=rows > 1,
        accumulation_steps=ceil(settings.train.batch_size / (rows * workload.processes)),
    )
    return peak_phase(
        phase for phase in plan_memory(batch_workload) if phase.name not in PHASES_WITHOUT_BATCH
    ).total
