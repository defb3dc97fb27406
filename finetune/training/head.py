"""The output head, applied only to the positions that are asked for.

With a vocabulary of 32k to 256k the head is a large part of a small model's work, and its logits most of a
large one's memory, while in instruction tuning often less than half of the positions carry loss. The states
that are not needed are taken out by a hook before the head; whatever the model does to its logits
afterwards (scaling, soft-capping) stays the model's.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def logits_at(model: nn.Module, head: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Run a causal model and return its logits at some positions.

    Args:
        model: the model, in any wrapper (PEFT, DDP); virtual tokens in front of the input are allowed for.
        head: its output embeddings.
        inputs: the forward pass's arguments, ``input_ids`` of shape (lines, columns) among them.
        positions: mask of shape (lines, columns).

    Returns:
        (N, vocabulary): the logits at the N true positions, in row-major order.
    """

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0][:, -positions.shape[1] :]
        return (states[positions].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    assert logits.shape[:2] == (1, int(positions.sum())), (
        f"the model bypasses its head: {tuple(logits.shape)}"
    )
    return logits.squeeze(0)  # a view: the gradient of an index would be a second tensor of this size


def output_head(model: PreTrainedModel) -> nn.Module:
    """Return the module that turns hidden states into logits."""
    head: nn.Module | None = model.get_output_embeddings()
    assert head is not None, f"{type(model).__name__} has no output embeddings"
    return head
