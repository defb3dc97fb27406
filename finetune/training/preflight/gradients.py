"""Gradient-flow check: which tensors get a gradient, and which must not; detects frozen or detached layers.

LoRA's A has a zero gradient while B is zero, so a zero gradient alone proves nothing. But what holds by
construction holds in every layer. Tensors are therefore compared with the same parameter in other layers: one
that is frozen, without a gradient or at zero while the others are not does not train. If a stack of layers
lacks gradients and another stack has them, the stack is another modality's, which text does not use.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.recipe.errors import Problem
from finetune.training.preflight.ticks import Tick, failed, some

NAME = "gradient"
PROMPT_ENCODER = "prompt_encoder"
"""PEFT's module of virtual tokens; a ModuleList in it holds prompts, not layers."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

State = int
FROZEN, NONE, ZERO, ALIVE = range(4)
"""States of a tensor after a backward pass, in increasing order."""


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters of one layer whose names differ only in an index (of experts, prompts).

    One of them with a gradient suffices. ``stack`` is the ModuleList of their layer ("" outside of the
    layers); ``kind`` is their name without indices, the same in every layer.
    """

    stack: str
    kind: str
    name: str
    parameters: list[nn.Parameter]


def groups(model: nn.Module) -> list[Group]:
    """Return all parameters in groups per layer and kind."""
    lists = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and PROMPT_ENCODER not in name
    ]
    # Outermost ModuleLists only: a list inside a layer holds its experts, not layers.
    layers = [name for name in lists if not any(name != other and name.startswith(other) for other in lists)]
    found: dict[tuple[str, str, str], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        found[_address(name, layers)].append((name, parameter))
    return [
        Group(stack, kind, named[0][0], [parameter for _, parameter in named])
        for (stack, kind, _), named in found.items()
    ]


def _address(name: str, layers: Sequence[str]) -> tuple[str, str, str]:
    """Return a parameter's stack, its kind, and the index of its layer ("" outside of the layers)."""
    stack = next((layer for layer in layers if name.startswith(layer)), "")
    number, _, tail = name.removeprefix(stack).partition(".") if stack else ("", "", name)
    return stack, f"{stack}*.{NUMBER.sub('#', tail)}", number


Of = Callable[[nn.Parameter], Tensor | None]
"""Returns a parameter's gradient, or a tensor of the same norm; None if it has no gradient."""


def held(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad


class Seen:
    """Gradient norms from backward hooks, for engines that remove ``.grad`` (ZeRO shards it into buffers).

    Stores the norm of each gradient, summed over the backward passes since ``reset``.
    """

    def __init__(self, model: nn.Module) -> None:
        """Register a hook on each trained parameter."""
        self.norms: dict[nn.Parameter, Tensor] = {}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.handles = [
            parameter.register_hook(partial(self._see, parameter))  # type: ignore[no-untyped-call]
            for parameter in trained
        ]

    def _see(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        size = gradient.detach().float().norm()
        self.norms[parameter] = self.norms[parameter] + size if parameter in self.norms else size

    def __call__(self, parameter: nn.Parameter) -> Tensor | None:
        return self.norms.get(parameter)

    def forget(self) -> None:
        """Clear the sums, after each optimizer step."""
        self.norms.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def states(found: Sequence[Group], of: Of = held) -> list[State]:
    """Return each group's best state: frozen, no gradient, zero gradient, or nonzero gradient."""
    there = [(p, of(p)) for group in found for p in group.parameters]
    # All norms at once: a device-to-host copy per parameter would synchronize thousands of times.
    norms = iter(_norms([gradient for _, gradient in there if gradient is not None]))
    best = {id(p): _state(p, gradient, norms) for p, gradient in there}
    return [max(best[id(parameter)] for parameter in group.parameters) for group in found]


def _state(parameter: nn.Parameter, gradient: Tensor | None, norms: Iterator[float]) -> State:
    if gradient is not None:
        size = next(norms)
        return ALIVE if size != 0 else ZERO  # NaN and infinity are checked elsewhere
    return NONE if parameter.requires_grad else FROZEN


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """Return the tensors' norms, with a single device-to-host copy."""
    if not tensors:
        return []
    sizes = [tensor.detach().float().norm() for tensor in tensors]
    whole = [size.full_tensor() if isinstance(size, DTensor) else size for size in sizes]  # FSDP2's shards
    found: list[float] = torch.stack(whole).tolist()
    return found


def reached(model: nn.Module, *, finite: bool = True, of: Of = held) -> Tick:
    """Check, after a backward pass, that every trained tensor gets a gradient and no frozen one does.

    Args:
        model: base with adapter, after a backward pass.
        finite: whether NaN and infinity fail the check (with loss scaling the first ones may be infinite).
        gradient_of: returns a parameter's gradient.
    """
    everything = groups(model)
    unused = _unused(everything, of)
    found = [group for group in everything if group.stack not in unused]
    wrong = [*_silent(found, of), *_stray(found), *(_infinite(found) if finite else [])]
    if wrong:
        expected = "a gradient for every tensor of the adapter, and for none of the base"
        repair = (
            "if text does not use these layers (another modality's), exclude them with adapter.target; "
            "otherwise the adapter does not fit this model"
        )
        return failed(NAME, Problem("adapter.method", "; ".join(wrong), expected, repair))
    learn = [state for group, state in zip(found, states(found, of), strict=True) if state != FROZEN]
    if all(state == ZERO for state in learn):
        problem = Problem("adapter.method", "all gradients are zero", "an adapter with nonzero gradients")
        return failed(NAME, problem)
    tensors = [parameter for group in found for parameter in group.parameters]
    learnt = sum(parameter.requires_grad for parameter in tensors)
    base = "; none in the base" if learnt < len(tensors) else ""
    names = some(sorted(stack.rstrip(".") for stack in unused))
    aside = f"; text does not use {names}: remove them from adapter.target" if unused else ""
    return Tick(
        NAME, f"reaches all {learnt} trained tensors{_at_zero(learn)}{base}{aside}", warned=bool(unused)
    )


def _unused(found: Sequence[Group], of: Of) -> set[str]:
    """Return the stacks of layers whose trained tensors all lack a gradient while another stack has some."""
    best: dict[str, State] = defaultdict(lambda: FROZEN)
    for group, state in zip(found, states(found, of), strict=True):
        best[group.stack] = max(best[group.stack], state)
    alive = any(state == ALIVE for state in best.values())
    return {stack for stack, state in best.items() if alive and stack and state == NONE}


def _at_zero(learn: Sequence[State]) -> str:
    share = sum(state == ZERO for state in learn) / len(learn)
    return f" ({share:.0%} of them have a zero gradient at initialization, as expected)" if share else ""


def _silent(found: Sequence[Group], of: Of) -> list[str]:
    """Return errors of groups without a gradient, or in a lower state than the same parameter elsewhere."""
    got = states(found, of)
    best: dict[str, State] = defaultdict(lambda: FROZEN)
    for group, state in zip(found, got, strict=True):
        best[group.kind] = max(best[group.kind], state)
    words = {FROZEN: "frozen", NONE: "without a gradient", ZERO: "with a zero gradient"}
    wrong = []
    for state, word in words.items():
        names = [
            group.name
            for group, own in zip(found, got, strict=True)
            if own == state and (own == NONE or best[group.kind] > own)
        ]
        if names:
            other = "" if state == NONE else ", unlike the same parameter in other layers"
            wrong.append(f"{len(names)} tensors are {word}{other}: {some(names)}")
    return wrong


def _stray(found: Sequence[Group]) -> list[str]:
    stray = [
        group.name
        for group in found
        if any(p.grad is not None and not p.requires_grad for p in group.parameters)
    ]
    return [f"{len(stray)} frozen tensors got a gradient: {some(stray)}"] if stray else []


def _infinite(found: Sequence[Group]) -> list[str]:
    named = [(group.name, p.grad) for group in found for p in group.parameters if p.grad is not None]
    sizes = _norms([gradient for _, gradient in named])
    names = [name for (name, _), size in zip(named, sizes, strict=True) if not math.isfinite(size)]
    return [f"{len(names)} gradients are NaN or infinite: {some(names)}"] if names else []
