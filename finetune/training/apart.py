"""Weights in parts, one for each process: a base loaded so, looked at before it is trained, read whole.

ZeRO-3 (arXiv 1910.02054) and FSDP2 (arXiv 2304.11277) hold a part of every weight in each process and fetch
the others as a layer needs them. What computes with such a model is done by all processes, equally often.
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
    """Tell whether some of a model's weights lie in parts on several processes."""
    return any(_by_zero(weight) or isinstance(weight.data, DTensor) for weight in model.parameters())


def numbers(weight: nn.Parameter) -> int:
    """Return how many numbers a parameter has, all processes' parts together."""
    size: int = getattr(weight, "ds_numel", weight.numel())  # ZeRO leaves nothing where the parameter was
    return size


def numbers_here(weight: nn.Parameter) -> int:
    """Return how many of a parameter's numbers are this process's to keep."""
    if _by_zero(weight):
        part: Tensor = vars(weight)["ds_tensor"]
        return part.numel()
    return weight.data.to_local().numel() if isinstance(weight.data, DTensor) else weight.numel()


def settle(model: nn.Module) -> None:
    """Give back what FSDP2 still holds of other processes' parts; shared weights are one parameter again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole(*weights: nn.Parameter) -> Iterator[list[Tensor]]:
    """Give parameters whole, for reading, while the block lasts; all processes must come here."""
    parted = [weight for weight in weights if _by_zero(weight)]
    if not parted:
        yield [_joined(weight.detach()) for weight in weights]
        return
    import deepspeed  # noqa: PLC0415 - a library that not every run has

    with deepspeed.zero.GatheredParameters(parted):
        yield [_joined(weight.detach()) for weight in weights]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights whole, on the CPU; all processes must come here."""
    found = {name: value.detach().cpu() for name, value in model.named_buffers()}
    for name, weight in model.named_parameters():
        with whole(weight) as (value,):
            found[name] = value.cpu().clone()
    return found


@contextmanager
def loading(stored: str, *, offload: str, folder: Path) -> Iterator[None]:
    """Have the library load bases in parts, as ZeRO-3 wants them, while the block lasts.

    Args:
        stored: type of the weights.
        offload: where the parts are kept.
        folder: where they are put with ``nvme``.
    """
    config = HfDeepSpeedConfig(loading_words(stored, offload=offload, folder=folder))
    yield  # transformers looks for the object, and forgets it when it is gone
    del config


@contextmanager
def measuring(model: nn.Module, base: PreTrainedModel, *, offload: str, folder: Path) -> Iterator[None]:
    """Let a model that ZeRO-3 loaded in parts compute, before there is an engine that trains it.

    Args:
        model: base with adapter.
        base: what was loaded in parts.
        offload: where the parts are kept.
        folder: where they are put with ``nvme``.
    """
    import deepspeed  # noqa: PLC0415 - a library that not every run has

    hidden = base.config.get_text_config().hidden_size
    words = measuring_words(hidden, offload=offload, folder=folder)
    engine, *_ = deepspeed.initialize(model=model, config=words)
    try:
        yield
    finally:
        engine.empty_partition_cache()  # what the last backward pass fetched and nobody gave back
        engine.destroy()


@torch.no_grad()
def root(base: PreTrainedModel) -> None:
    """Make FSDP2 take the whole model for its root, by a first pass.

    Prompt tuning embeds the tokens before it calls the base; FSDP2 would take the embeddings for a model.
    """
    base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=base.device), use_cache=False)


def _by_zero(weight: nn.Parameter) -> bool:
    return getattr(weight, "ds_id", None) is not None


def _joined(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
