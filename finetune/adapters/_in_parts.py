"""Weights of a base that ZeRO-3 has loaded in parts (arXiv 1910.02054), read while an adapter is made."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn


def whole(weight: Tensor) -> AbstractContextManager[None]:
    """Give a parameter whole, for reading, while the block lasts; all processes must come here."""
    context: AbstractContextManager[None] = gather_params_ctx(weight, modifier_rank=None)
    return context


@contextmanager
def fetched(model: nn.Module) -> Iterator[None]:
    """Let a base compute before there is an engine: a module's own weights are whole while it runs.

    One module's at a time, so that no process holds the whole base. All processes must come here.
    """
    opened: dict[nn.Module, list[AbstractContextManager[None]]] = {}

    def fetch(module: nn.Module, inputs: object) -> None:
        opened[module] = [whole(weight) for weight in module.parameters(recurse=False)]
        for context in opened[module]:
            context.__enter__()

    def release(module: nn.Module, inputs: object, output: object) -> None:
        for context in reversed(opened.pop(module)):
            context.__exit__(None, None, None)

    modules = [module for module in model.modules() if list(module.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(fetch) for module in modules]
    handles += [module.register_forward_hook(release) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
