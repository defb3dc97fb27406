"""Which tensors get a gradient, and which must not: a frozen or disconnected layer is found by its likes.

A LoRA's A gets a gradient of zero while B is zero, so zeros alone prove nothing. But what is so by
construction is so in every layer. Tensors are therefore compared with those of the same name in the other
layers: one that is frozen, without a gradient or at zero where its likes are not does not learn. A whole
stack of layers without gradients beside one that has them is another modality's, which text does not pass.
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
"""Where PEFT keeps virtual tokens; a list in there counts prompts, not layers."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

State = int
FROZEN, NONE, ZERO, ALIVE = range(4)
"""What can be said of a tensor after a backward pass, the least first."""


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one layer that differ in a number alone (an expert's, a prompt's): one of them suffices.

    ``stack`` names the list that their layer stands in ("" outside of the layers); ``kind`` is their name
    without any number, the same in every layer.
    """

    stack: str
    kind: str
    name: str
    parameters: list[nn.Parameter]


def groups(model: nn.Module) -> list[Group]:
    """Return all parameters in groups, those of a layer apart from those of the others."""
    lists = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and PROMPT_ENCODER not in name
    ]
    layers = [name for name in lists if not any(name != other and name.startswith(other) for other in lists)]
    found: dict[tuple[str, str, str], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        found[_address(name, layers)].append((name, parameter))
    return [
        Group(stack, kind, named[0][0], [parameter for _, parameter in named])
        for (stack, kind, _), named in found.items()
    ]


def _address(name: str, layers: Sequence[str]) -> tuple[str, str, str]:
    """Return a parameter's stack, its kind, and the number of its layer ("" outside of the layers)."""
    stack = next((layer for layer in layers if name.startswith(layer)), "")
    number, _, tail = name.removeprefix(stack).partition(".") if stack else ("", "", name)
    return stack, f"{stack}*.{NUMBER.sub('#', tail)}", number


Of = Callable[[nn.Parameter], Tensor | None]
"""Gives a parameter's gradient, or a tensor of the same norm; None where it has none."""


def held(parameter: nn.Parameter) -> Tensor | None:
    """Return the gradient that lies beside the parameter, as after every backward pass of PyTorch's."""
    return parameter.grad


class Seen:
    """Gradients as they pass by, for engines that take them away (ZeRO keeps its parts of them in buffers).

    Kept is the norm of each, summed over the passes since ``forget``.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch all that is trained."""
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
        """Return the summed norm."""
        return self.norms.get(parameter)

    def forget(self) -> None:
        """Begin anew, at the next step."""
        self.norms.clear()

    def close(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()


def states(found: Sequence[Group], of: Of = held) -> list[State]:
    """Return what each group's best tensor has: frozen, no gradient, one of zeros, or another one."""
    there = [(p, of(p)) for group in found for p in group.parameters]
    norms = iter(_norms([gradient for _, gradient in there if gradient is not None]))
    best = {id(p): _state(p, gradient, norms) for p, gradient in there}
    return [max(best[id(parameter)] for parameter in group.parameters) for group in found]


def _state(parameter: nn.Parameter, gradient: Tensor | None, norms: Iterator[float]) -> State:
    if gradient is not None:
        size = next(norms)
        return ALIVE if size != 0 else ZERO  # NaN and infinity are told apart elsewhere
    return NONE if parameter.requires_grad else FROZEN


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """Return the tensors' norms with one transfer from the device."""
    if not tensors:
        return []
    sizes = [tensor.detach().float().norm() for tensor in tensors]
    whole = [size.full_tensor() if isinstance(size, DTensor) else size for size in sizes]  # FSDP2's parts
    found: list[float] = torch.stack(whole).tolist()
    return found


def reached(model: nn.Module, *, finite: bool = True, of: Of = held) -> Tick:
    """Check, behind a backward pass, that all that is to learn gets a gradient and nothing else does.

    Args:
        model: base with adapter, gradients in place.
        finite: whether NaN and infinity are mistakes (with loss scaling the first ones may be infinite).
        of: where gradients are found.
    """
    everything = groups(model)
    unused = _unused(everything, of)
    found = [group for group in everything if group.stack not in unused]
    wrong = [*_silent(found, of), *_stray(found), *(_infinite(found) if finite else [])]
    if wrong:
        expected = "a gradient for every tensor of the adapter, and for none of the base"
        repair = (
            "if the text never passes through them (another modality's layers), leave them out with "
            "adapter.target; otherwise the adapter does not fit this model"
        )
        return failed(NAME, Problem("adapter.method", "; ".join(wrong), expected, repair))
    learn = [state for group, state in zip(found, states(found, of), strict=True) if state != FROZEN]
    if all(state == ZERO for state in learn):
        problem = Problem("adapter.method", "nothing gets a gradient but zeros", "an adapter that learns")
        return failed(NAME, problem)
    tensors = [parameter for group in found for parameter in group.parameters]
    learnt = sum(parameter.requires_grad for parameter in tensors)
    base = "; the base has none" if learnt < len(tensors) else ""
    names = some(sorted(stack.rstrip(".") for stack in unused))
    aside = f"; text passes by {names}: take them out of adapter.target" if unused else ""
    return Tick(
        NAME, f"reaches all {learnt} trained tensors{_at_zero(learn)}{base}{aside}", warned=bool(unused)
    )


def _unused(found: Sequence[Group], of: Of) -> set[str]:
    """Return the stacks of layers whose trained tensors all lack a gradient, where others have one."""
    best: dict[str, State] = defaultdict(lambda: FROZEN)
    for group, state in zip(found, states(found, of), strict=True):
        best[group.stack] = max(best[group.stack], state)
    alive = any(state == ALIVE for state in best.values())
    return {stack for stack, state in best.items() if alive and stack and state == NONE}


def _at_zero(learn: Sequence[State]) -> str:
    share = sum(state == ZERO for state in learn) / len(learn)
    return f" ({share:.0%} of them start at zero, as they should)" if share else ""


def _silent(found: Sequence[Group], of: Of) -> list[str]:
    """Return what is wrong with groups that do less than their likes in other layers, or get no gradient."""
    got = states(found, of)
    best: dict[str, State] = defaultdict(lambda: FROZEN)
    for group, state in zip(found, got, strict=True):
        best[group.kind] = max(best[group.kind], state)
    words = {FROZEN: "frozen", NONE: "without a gradient", ZERO: "with a gradient of zeros"}
    wrong = []
    for state, word in words.items():
        names = [
            group.name
            for group, own in zip(found, got, strict=True)
            if own == state and (own == NONE or best[group.kind] > own)
        ]
        if names:
            other = "" if state == NONE else ", unlike their likes in other layers"
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
