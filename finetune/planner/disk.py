"""Disk space of a run: adapter or model, checkpoints, merged model."""

from finetune.planner.static_memory import optimizer_bytes
from finetune.planner.workload import ITEMSIZES, Workload

FLOAT32_BYTES = 4


def disk_bytes(workload: Workload, *, trained_params: int, num_checkpoints: int) -> dict[str, int]:
    """Return the bytes that a run writes, by kind of file.

    A checkpoint holds the trained weights in float32 and the optimizer states; `llm-align merge` writes the
    full model in the precision of the forward pass.

    Args:
        workload: the training workload.
        trained_params: number of trained parameters.
        num_checkpoints: checkpoints that are retained.
    """
    architecture = workload.architecture
    optimizer_state = optimizer_bytes(workload, trained_params)
    checkpoints = (num_checkpoints + 1) * (
        FLOAT32_BYTES * trained_params + optimizer_state
    )  # the oldest is deleted after the next is written
    merged_model = architecture.parameters * ITEMSIZES[workload.precision]
    if workload.adapter.full_finetuning:
        return {"model": FLOAT32_BYTES * architecture.parameters, "checkpoints": checkpoints}
    return {
        "adapter": FLOAT32_BYTES * trained_params,
        "checkpoints": checkpoints,
        "merged model, if requested": merged_model,
    }
