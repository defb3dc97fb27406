"""Apply the LM head only at selected positions.

With a vocabulary of 32k to 256k the head is a large part of a small model's compute, and its logits most of a
large one's memory, while in instruction tuning often less than half of the positions carry loss. A hook drops
the other hidden states before the head; the model still does its own scaling and soft-capping of the logits.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def logits_at(model: nn.Module, head: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Run a causal model and return its logits at selected positions.

    Args:
        model: the model, in any wrapper (PEFT, DDP); virtual tokens may precede the input.
        head: its output embeddings.
        inputs: the arguments of the forward pass, with ``input_ids`` of shape (B, T).
        mask_BT: (B, T) mask.

    Returns:
        (N, V): the logits at the N true positions, in row-major order.
    """

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0][:, -positions.shape[1] :]  # without the virtual tokens of a prompt adapter
        return (states[positions].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    assert logits.shape[:2] == (1, int(positions.sum())), (
        f"the model bypasses its head: {tuple(logits.shape)}"
    )
    return logits.squeeze(0)  # a view; indexing with [0] would allocate a second gradient of this size


def output_head(model: PreTrainedModel) -> nn.Module:
    """Return a model's LM head."""
    head: nn.Module | None = model.get_output_embeddings()
    assert head is not None, f"{type(model).__name__} has no output embeddings"
    return head
