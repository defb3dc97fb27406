"""What a run leaves on the disk."""

from finetune.planning.resident import optimizer_bytes
from finetune.planning.workload import BYTES, Workload

FLOAT32 = 4


def disk_bytes(workload: Workload, *, trained: int, kept: int) -> dict[str, int]:
    """Return the bytes of what a run writes, by what it is.

    Args:
        workload: what is trained.
        trained: parameters that are trained.
        kept: checkpoints that are kept; one more lies there while the next is written.

    A checkpoint holds the trained weights in float32 and the optimizer's states; `llm-align merge` writes the
    whole model in the precision of its passes.
    """
    architecture = workload.architecture
    states = optimizer_bytes(workload, trained)
    checkpoints = (kept + 1) * (FLOAT32 * trained + states)
    whole = architecture.parameters * BYTES[workload.precision]
    if workload.adapter.whole_model:
        return {"model": FLOAT32 * architecture.parameters, "checkpoints": checkpoints}
    return {"adapter": FLOAT32 * trained, "checkpoints": checkpoints, "merged model, if asked for": whole}
