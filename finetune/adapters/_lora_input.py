"""Inputs of LoRA layers: no float32 copies under autocast, and on a CPU dropout with cheap masks.

PEFT 0.21.2 casts each layer's input to the dtype of A, float32, before the dropout; autocast casts it back.
On a CPU torch draws dropout masks one Bernoulli variable at a time, and saves them in the input's dtype. Here
a mask compares 16 random bits per element with a threshold, and one bit per element is saved.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

RANDOM_VALUES = 2**16
"""A dropout probability on a CPU is a multiple of 1 / 65536."""
INTEGERS_BY_ITEMSIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def optimize_lora_inputs(model: nn.Module) -> None:
    """Prepare the LoRA, AdaLoRA and VeRA layers of a model with an adapter; names of weights do not change.

    DoRA keeps the cast: it computes the norms of the merged weight in the dtype of its input.
    """
    linear_inputs = []  # layers that only multiply their input by a matrix, which autocast casts again
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _replace_dropout(module.lora_dropout)
            if not module.lora_variant:
                linear_inputs.append(module)
                _fuse_dropout(module)
        elif isinstance(module, VeraLayer):
            _replace_dropout(module.vera_dropout)
            linear_inputs.append(module)
    if not linear_inputs:
        return

    def select_cast(decoder: nn.Module, args: Any) -> None:
        # Without autocast (generation) the matrices are multiplied as they are, and need the cast.
        enabled = not torch.is_autocast_enabled(next(decoder.parameters()).device.type)
        for layer in linear_inputs:
            layer.cast_input_dtype_enabled = enabled

    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    # The decoder and not the model: Accelerate enters autocast in the model's own forward method.
    base.base_model.register_forward_pre_hook(select_cast)


def _replace_dropout(dropouts: nn.ModuleDict) -> None:
    for name, dropout in dropouts.items():
        if isinstance(dropout, nn.Dropout):
            dropouts[name] = CheapDropout(dropout.p)


def _fuse_dropout(layer: LoraLayer) -> None:
    """Move the dropout of a LoRA layer into its A, where it is a linear layer (AdaLoRA's is a weight)."""
    for name, dropout in layer.lora_dropout.items():
        down = dict(layer.lora_A.items()).get(name)
        if isinstance(dropout, CheapDropout) and isinstance(down, nn.Linear):
            layer.lora_A[name] = DropoutLinear(down, dropout)
            layer.lora_dropout[name] = nn.Identity()


class CheapDropout(nn.Dropout):
    """Dropout; on a CPU its mask costs little time and one bit per element."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs with dropout in training mode."""
        if not self.training or not self.p or inputs.device.type != "cpu":
            return super().forward(inputs)
        output: Tensor = _Dropout.apply(inputs, self.p)  # type: ignore[no-untyped-call]
        return output


class DropoutLinear(nn.Module):
    """LoRA's A with dropout at its input: on a CPU the input before the dropout is saved.

    Layers share it: queries, keys and values read the same states, each with another mask.
    """

    def __init__(self, linear: nn.Linear, dropout: nn.Dropout) -> None:
        """Take over the weight of A, which has no bias; ``dropout.p`` may change later (PPO sets it to 0)."""
        super().__init__()
        assert linear.bias is None
        # Not a subclass of nn.Linear, whose __init__ makes a second weight (which ZeRO-3 would shard).
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.weight: nn.Parameter = linear.weight
        self.dropout: nn.Dropout = dropout
        self.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product of the weight and the inputs after dropout."""
        device, p = inputs.device.type, self.dropout.p
        if not self.training or not p or device != "cpu":
            return F.linear(self.dropout(inputs), self.weight)
        # autocast does not cast the arguments of a Function.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        output: Tensor = _DropoutLinear.apply(inputs.to(dtype), self.weight.to(dtype), p)  # type: ignore[no-untyped-call]
        return output


class _Dropout(Function):
    """h = x * m / (1 - p), with m drawn from Bernoulli(1 - p)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, p: float) -> Tensor:
        keep, scale = draw_mask(inputs, p)
        ctx.save_for_backward(pack_mask(keep))
        ctx.scale = scale
        return _select(inputs, keep) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (packed,) = ctx.saved_tensors
        return _select(grad, unpack_mask(packed, grad)) * ctx.scale, None


class _DropoutLinear(Function):
    """h = W (x * m) / (1 - p); the backward pass applies the mask to x again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, p: float) -> Tensor:
        keep, scale = draw_mask(inputs, p)
        ctx.save_for_backward(inputs, weight, pack_mask(keep))
        ctx.scale = scale
        # The narrow side is scaled: the rank is a small part of the layer's width.
        return F.linear(_select(inputs, keep), weight) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weight, packed = ctx.saved_tensors
        keep, grad = unpack_mask(packed, inputs), grad * ctx.scale
        grad_inputs = _select(grad @ weight, keep) if ctx.needs_input_grad[0] else None
        rows = _select(inputs, keep).flatten(0, -2)
        return grad_inputs, grad.flatten(0, -2).T @ rows, None


def draw_mask(inputs: Tensor, p: float) -> tuple[Tensor, float]:
    """Return a mask of the inputs' shape, true where they are kept, and the scale of what is kept.

    The 128-bit seed of numpy's generator (SFC64) comes from torch's global one: checkpoints store its state,
    and gradient checkpointing restores it to draw the same mask again.
    """
    threshold = min(max(round(p * RANDOM_VALUES), 1), RANDOM_VALUES - 1)
    seed = torch.empty(2, dtype=torch.int64).random_().tolist()
    words = -(-inputs.numel() * 2 // 8)  # of 64 bits: 4 elements each
    bits = np.random.SFC64(seed).random_raw(words).view(np.uint16)[: inputs.numel()]
    keep = torch.from_numpy(bits >= threshold).view(inputs.shape)
    return keep, RANDOM_VALUES / (RANDOM_VALUES - threshold)


def pack_mask(keep: Tensor) -> Tensor:
    """Return the mask with 8 elements in a byte."""
    return torch.from_numpy(np.packbits(keep.numpy()))


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """Return the mask of a packed one, in the shape of ``like``."""
    bits = np.unpackbits(packed.numpy(), count=like.numel())
    return torch.from_numpy(bits).view(torch.bool).view(like.shape)


def _select(values: Tensor, keep: Tensor) -> Tensor:
    """Return the values where ``keep`` is true, and 0 elsewhere.

    The bits are multiplied by 0 or 1 as integers: in torch 2.13 that takes a quarter of the time of a product
    with a boolean or of ``where``, in bfloat16.
    """
    integers = INTEGERS_BY_ITEMSIZE[values.itemsize]
    return (values.contiguous().view(integers) * keep.view(torch.int8)).view(values.dtype)
