"""Sharded weights under ZeRO-3 and FSDP2: load them sharded, run forward passes, gather full parameters.

ZeRO-3 (arXiv 1910.02054) and FSDP2 (arXiv 2304.11277) store a shard of every weight on each rank and
all-gather a layer's weights when it computes. Every rank must run as many forward passes as the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from finetune.training.strategies import loading_words, measuring_words


def in_parts(model: nn.Module) -> bool:
    """Return whether any of a model's weights is sharded over ranks."""
    return any(_by_zero(weight) or isinstance(weight.data, DTensor) for weight in model.parameters())


def numbers(weight: nn.Parameter) -> int:
    """Return the number of elements of the full parameter, over all shards."""
    size: int = getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 leaves an empty tensor in the parameter
    return size


def numbers_here(weight: nn.Parameter) -> int:
    """Return the number of elements in this rank's shard of a parameter."""
    if _by_zero(weight):
        part: Tensor = vars(weight)["ds_tensor"]
        return part.numel()
    return weight.data.to_local().numel() if isinstance(weight.data, DTensor) else weight.numel()


def settle(model: nn.Module) -> None:
    """Free the parameters that FSDP2 still holds gathered; tied weights are one parameter again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole(*weights: nn.Parameter) -> Iterator[list[Tensor]]:
    """Yield the full tensors of parameters, for reading; a collective, every rank must call it."""
    parted = [weight for weight in weights if _by_zero(weight)]
    if not parted:
        yield [_joined(weight.detach()) for weight in weights]
        return
    import deepspeed  # noqa: PLC0415 - a library that not every run has

    with deepspeed.zero.GatheredParameters(parted):
        yield [_joined(weight.detach()) for weight in weights]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's full state dict on the CPU; a collective, every rank must call it."""
    found = {name: value.detach().cpu() for name, value in model.named_buffers()}
    for name, weight in model.named_parameters():
        # One parameter at a time: gathered all at once, the model would have to fit on every rank.
        with whole(weight) as (value,):
            found[name] = value.cpu().clone()
    return found


@contextmanager
def loading(stored: str, *, offload: str, folder: Path) -> Iterator[None]:
    """Make ``from_pretrained`` load models sharded for ZeRO-3 inside the block.

    Args:
        dtype: dtype of the weights.
        offload: where the shards are stored: ``none``, ``cpu`` or ``nvme``.
        folder: root of the swap folder for ``nvme``.
    """
    config = HfDeepSpeedConfig(loading_words(stored, offload=offload, folder=folder))
    yield  # transformers holds a weak reference to this object and loads sharded as long as it is alive
    del config


@contextmanager
def measuring(model: nn.Module, base: PreTrainedModel, *, offload: str, folder: Path) -> Iterator[None]:
    """Wrap a ZeRO-3 model in an inference engine, for forward passes before the training engine exists.

    Args:
        model: base with adapter.
        base: the base, which was loaded sharded.
        offload: where the shards are stored: ``none``, ``cpu`` or ``nvme``.
        folder: root of the swap folder for ``nvme``.
    """
    import deepspeed  # noqa: PLC0415 - a library that not every run has

    hidden = base.config.get_text_config().hidden_size
    words = measuring_words(hidden, offload=offload, folder=folder)
    engine, *_ = deepspeed.initialize(model=model, config=words)
    try:
        yield
    finally:
        engine.empty_partition_cache()  # weights that the last backward pass gathered and never released
        engine.destroy()


@torch.no_grad()
def root(base: PreTrainedModel) -> None:
    """Make the full model FSDP2's root module, by a first forward pass."""
    # FSDP2 takes the first module that runs for its root. Prompt tuning embeds the tokens before it calls the
    # base, which would make the embeddings the root.
    base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=base.device), use_cache=False)


def _by_zero(weight: nn.Parameter) -> bool:
    return getattr(weight, "ds_id", None) is not None


def _joined(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
