"""Apply a causal model's LM head at selected positions only: logits of all may not fit into memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def head_positions(head: nn.Module, mask_BT: Tensor) -> Iterator[None]:
    """Apply an LM head only at selected positions, in every forward pass inside the block.

    Args:
        head: the model's output embeddings.
        mask_BT: (B, T) mask of the N positions; the logits are then (1, N, V), in row-major order.
    """

    def select_positions(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states_BTD = args[0][:, -mask_BT.shape[1] :]  # without the virtual tokens of a prompt adapter
        return (states_BTD[mask_BT].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select_positions)
    try:
        yield
    finally:
        handle.remove()


def logits_at(model: nn.Module, head: nn.Module, inputs: dict[str, Any], mask_BT: Tensor) -> Tensor:
    """Run a causal model and return its logits at selected positions.

    Args:
        model: the model, in any wrapper (PEFT, DDP); virtual tokens may precede the input.
        head: its output embeddings.
        inputs: the arguments of the forward pass, with ``input_ids`` of shape (B, T).
        mask_BT: (B, T) mask.

    Returns:
        (N, V): the logits at the N true positions, in row-major order.
    """
    with head_positions(head, mask_BT):
        logits_NV: Tensor = model(**inputs, use_cache=False).logits
    assert logits_NV.shape[:2] == (1, int(mask_BT.sum())), (
        f"the model bypasses its head: {tuple(logits_NV.shape)}"
    )
    return logits_NV.squeeze(0)  # a view; indexing with [0] would allocate a second gradient of this size
