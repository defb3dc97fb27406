"""Disk space of a run: adapter or model, checkpoints, merged model."""

from finetune.planning.resident import optimizer_bytes
from finetune.planning.workload import BYTES, Workload

FLOAT32 = 4


def disk_bytes(workload: Workload, *, trained: int, kept: int) -> dict[str, int]:
    """Return the bytes that a run writes, by kind of file.

    A checkpoint holds the trained weights in float32 and the optimizer states; `llm-align merge` writes the
    full model in the precision of the forward pass.

    Args:
        workload: the training workload.
        trained_params: number of trained parameters.
        num_checkpoints: checkpoints that are retained.
    """
    architecture = workload.architecture
    states = optimizer_bytes(workload, trained)
    checkpoints = (kept + 1) * (FLOAT32 * trained + states)  # the oldest is deleted after the next is written
    whole = architecture.parameters * BYTES[workload.precision]
    if workload.adapter.whole_model:
        return {"model": FLOAT32 * architecture.parameters, "checkpoints": checkpoints}
    return {"adapter": FLOAT32 * trained, "checkpoints": checkpoints, "merged model, if requested": whole}
