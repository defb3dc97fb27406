"""Sharded weights under ZeRO-3 and FSDP2: load them sharded, run forward passes, gather full parameters.

ZeRO-3 (arXiv 1910.02054) and FSDP2 (arXiv 2304.11277) store a shard of every weight on each rank and
all-gather a layer's weights when it computes. Every rank must run as many forward passes as the others.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from finetune.distributed.strategies import zero3_inference_config, zero3_init_config
from finetune.library_internals import is_zero3_param, zero3_full_shape, zero3_shard


def is_sharded(model: nn.Module) -> bool:
    """Return whether any of a model's weights is sharded over ranks."""
    return any(is_zero3_param(param) or isinstance(param.data, DTensor) for param in model.parameters())


def full_numel(param: nn.Parameter) -> int:
    """Return the number of elements of the full parameter, over all shards."""
    return zero3_full_shape(param).numel()


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a parameter or buffer, or all of it."""
    if is_zero3_param(tensor):
        return zero3_shard(tensor)
    return tensor.data.to_local() if isinstance(tensor.data, DTensor) else tensor.data


def local_numel(param: nn.Parameter) -> int:
    """Return the number of elements in this rank's shard of a parameter."""
    return local_shard(param).numel()


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 still holds gathered; tied weights are one parameter again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered_weight(weight: Tensor) -> AbstractContextManager[None]:
    """Gather a parameter for reading inside the context; a collective, every rank must enter it."""
    # modifier_rank=None: the weights are only read, so no rank's values are broadcast on exit.
    context: AbstractContextManager[None] = gather_params_ctx(weight, modifier_rank=None)
    return context


@contextmanager
def gather_on_forward(model: nn.Module) -> Iterator[None]:
    """Gather each module's weights during its forward pass, so that a model runs without a DeepSpeed engine.

    A collective: every rank must call it and run the same forward passes.
    """
    # Only the module's own weights (recurse=False): no rank ever holds the full base.
    open_contexts: dict[nn.Module, list[AbstractContextManager[None]]] = {}

    def gather(module: nn.Module, inputs: object) -> None:
        open_contexts[module] = [gathered_weight(weight) for weight in module.parameters(recurse=False)]
        for context in open_contexts[module]:
            # Entered by hand: a `with` cannot span the two hooks.
            context.__enter__()

    def release(module: nn.Module, inputs: object, output: object) -> None:
        for context in reversed(open_contexts.pop(module)):
            context.__exit__(None, None, None)

    modules = [module for module in model.modules() if list(module.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(gather) for module in modules]
    handles += [module.register_forward_hook(release) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gathered_params(*params: nn.Parameter) -> Iterator[list[Tensor]]:
    """Yield the full tensors of parameters, for reading; a collective, every rank must call it."""
    zero3_params = [param for param in params if is_zero3_param(param)]
    if not zero3_params:
        yield [_full_tensor(param.detach()) for param in params]
        return
    import deepspeed  # noqa: PLC0415 - a library that not every run has

    with deepspeed.zero.GatheredParameters(zero3_params):
        yield [_full_tensor(param.detach()) for param in params]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's full state dict on the CPU; a collective, every rank must call it."""
    state = {name: full.detach().cpu() for name, full in model.named_buffers()}
    for name, param in model.named_parameters():
        # One parameter at a time: gathered all at once, the model would have to fit on every rank.
        with gathered_params(param) as (full,):
            # On a CPU `.cpu()` is the same tensor, which ZeRO-3 frees when the block ends: hence the clone.
            state[name] = full.cpu().clone()
    return state


@contextmanager
def zero3_init(dtype: str, *, offload: str, folder: Path) -> Iterator[None]:
    """Make ``from_pretrained`` load models sharded for ZeRO-3 inside the block.

    Args:
        dtype: dtype of the weights.
        offload: where the shards are stored: ``none``, ``cpu`` or ``nvme``.
        folder: root of the swap folder for ``nvme``.
    """
    config = HfDeepSpeedConfig(zero3_init_config(dtype, offload=offload, folder=folder))
    yield  # transformers holds a weak reference to this object and loads sharded as long as it is alive
    del config


@contextmanager
def zero3_inference_engine(
    model: nn.Module, base: PreTrainedModel, *, offload: str, folder: Path
) -> Iterator[None]:
    """Wrap a ZeRO-3 model in an inference engine, for forward passes before the training engine exists.

    Args:
        model: base with adapter.
        base: the base, which was loaded sharded.
        offload: where the shards are stored: ``none``, ``cpu`` or ``nvme``.
        folder: root of the swap folder for ``nvme``.
    """
    import deepspeed  # noqa: PLC0415 - a library that not every run has

    hidden_size = base.config.get_text_config().hidden_size
    config = zero3_inference_config(hidden_size, offload=offload, folder=folder)
    # The engine's hooks gather each layer's weights; its forward pass is not called, the model's is.
    engine, *_ = deepspeed.initialize(model=model, config=config)
    try:
        yield
    finally:
        engine.empty_partition_cache()  # weights that the last backward pass gathered and never released
        engine.destroy()


@torch.no_grad()
def set_fsdp_root(base: PreTrainedModel) -> None:
    """Make the full model FSDP2's root module, by a first forward pass."""
    # FSDP2 takes the first module that runs for its root. Prompt tuning embeds the tokens before it calls the
    # base, which would make the embeddings the root.
    base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=base.device), use_cache=False)


def _full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
