"""What a forward pass keeps for its backward pass, and what both take for a moment."""

from finetune.planning.resident import Resident
from finetune.planning.trained import targets
from finetune.planning.workload import LOW_RANK, Workload

MAX_ELEMENTS = 2**26
"""Logits that are turned into float32 at a time, as in finetune/training/loss.py."""


def forward_backward(workload: Workload, held: Resident) -> dict[str, int]:
    """Return activations, logits and gradients where a forward and backward pass is fullest."""
    layers = workload.architecture.layers
    one = saved(workload)
    roles = 2 if workload.objective == "ppo" else 1
    states = workload.tokens * workload.architecture.hidden * workload.bytes
    kept = layers * states + one if workload.checkpointing else layers * one
    return {
        "gradients": held.gradients if workload.accumulated > 1 or workload.adapter.whole_model else 0,
        "activations": roles * kept,
        "logits and loss": logits(workload),
        "workspace": 4 * workload.tokens * workload.architecture.intermediate,
    }


def saved(workload: Workload) -> int:
    """Return what one decoder layer keeps for its backward pass."""
    model, tokens, size = workload.architecture, workload.tokens, workload.bytes
    mixed = size < 4
    norms = 2 * tokens * model.hidden * 4
    attention = tokens * size * (2 * model.queries + 2 * model.keys) + 4 * tokens * model.heads
    mask = workload.lines * workload.width**2 * size if workload.masked else 0
    scores = 2 * workload.lines * model.heads * workload.width**2 * size
    mlp = tokens * size * model.intermediate * (3 if model.gated else 1)
    inputs = 0
    if workload.adapter.method in LOW_RANK:
        dropped = (1 if workload.device == "cuda" else 4) if workload.adapter.dropout else 0
        chosen = [layer for layer in targets(model, workload.adapter) if layer.count == model.layers]
        copy = size if mixed or dropped else 0
        inputs = sum(
            tokens * (layer.inputs * (copy + dropped) + size * workload.adapter.rank) for layer in chosen
        )
    return norms + attention + mask + mlp + inputs + (scores if _eager(workload) else 0)


def logits(workload: Workload) -> int:
    """Return what the head and the loss hold."""
    if workload.objective == "scores":
        return 0
    numbers = workload.predicted * workload.architecture.vocabulary
    return numbers * 8 + 8 * min(numbers, MAX_ELEMENTS)


def _eager(workload: Workload) -> bool:
    return workload.attention == "eager" or workload.architecture.eager
