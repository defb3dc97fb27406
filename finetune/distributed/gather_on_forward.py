"""Gather ZeRO-3's sharded weights (arXiv 1910.02054) for reading and for forward passes without an engine."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn


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
