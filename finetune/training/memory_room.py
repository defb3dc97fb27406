"""Resolve ``micro_batch_size: auto`` on a GPU: does a batch of N rows fit, by the memory plan?"""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import torch

from finetune.planning.devices import GIB, SURE
from finetune.planning.from_recipe import architecture_of, step_of
from finetune.planning.memory import peak, plan_memory
from finetune.planning.workload import Objective, Workload
from finetune.recipe.errors import UserError
from finetune.recipe.settings import StageSettings
from finetune.training.loading import Policy

WITHOUT_ROWS = ("merge", "rollout")
OBJECTIVES: dict[str, Objective] = {
    "SFTConfig": "likelihood",
    "DPOConfig": "comparison",
    "KTOConfig": "comparison",
    "RLOOConfig": "comparison",
    "GRPOConfig": "comparison",
    "RewardConfig": "scores",
}
"""The planner's objective (loss on the last hidden states) of a stage, by its TRL config; TRL has no PPO."""


def rows_that_fit(
    settings: StageSettings, policy: Policy, *, longest: int, processes: int, strategy: str, room: int
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
        architecture = architecture_of(settings.model)
    except UserError:
        return None
    step = step_of(
        settings,
        architecture,
        precision=policy.precision,
        quantization=policy.quantization,
        device="cuda",
    )
    step = replace(step, processes=processes, strategy=strategy, offload=settings.train.offload)  # type: ignore[arg-type]
    return lambda rows: _needed(settings, step, rows, longest) <= SURE * room


def free_bytes() -> int:
    """Return the GPU memory available to this process, free or reserved by it, rounded down to full GiB."""
    # Rounded, so that the same command resolves to the same micro-batch size when a little more is free.
    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved()) // GIB * GIB


def _needed(settings: StageSettings, step: Workload, rows: int, longest: int) -> int:
    objective: Objective = "ppo" if "ppo" in dict(settings) else OBJECTIVES[settings.TRL_CONFIG]
    own = replace(
        step,
        objective=objective,
        lines=rows,
        columns=longest,
        predicted=rows * longest,
        completions=2 * rows if objective != "likelihood" else 0,
        heads=1 if objective in ("scores", "ppo") else 0,
        masked=rows > 1,
        accumulated=ceil(settings.train.batch_size / (rows * step.processes)),
    )
    return peak(phase for phase in plan_memory(own) if phase.name not in WITHOUT_ROWS).total
