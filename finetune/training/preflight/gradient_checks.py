"""Gradient-flow check: which tensors get a gradient, and which must not; detects frozen or detached layers.

LoRA's A has a zero gradient while B is zero, so a zero gradient alone proves nothing. But what holds by
construction holds in every layer. A tensor is therefore compared with the same parameter in other layers: if
it is frozen or without a gradient and the others are not, it is detached, and the run stops. At zero unlike
the others it is connected but has no effect on these rows, such as a layer after a dead ReLU: a warning. A
stack of layers without gradients, while another stack has them, belongs to a modality that text does not use.
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
from finetune.training.preflight.checks import CheckResult, failed, first_few

GRADIENT = "gradient"
PROMPT_ENCODER = "prompt_encoder"
"""PEFT's module of virtual tokens; a ModuleList in it holds prompts, not layers."""
INDEX_PATTERN = re.compile(r"(?<=\.)\d+(?=\.|$)")

GradientState = int
FROZEN, NO_GRADIENT, ZERO_GRADIENT, NONZERO_GRADIENT = range(4)
"""States of a tensor after a backward pass, in increasing order."""


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters of one layer whose names differ only in an index (of experts, prompts).

    One of them with a gradient suffices. ``stack`` is the ModuleList of their layer ("" outside of the
    layers); ``kind`` is their name without indices, the same in every layer.
    """

    stack: str
    kind: str
    name: str
    parameters: list[nn.Parameter]


def group_parameters(model: nn.Module) -> list[ParameterGroup]:
    """Return all parameters in groups per layer and kind."""
    lists = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and PROMPT_ENCODER not in name
    ]
    # Outermost ModuleLists only: a list inside a layer holds its experts, not layers.
    layers = [name for name in lists if not any(name != other and name.startswith(other) for other in lists)]
    members: dict[tuple[str, str, str], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        members[_group_key(name, layers)].append((name, parameter))
    return [
        ParameterGroup(stack, kind, named[0][0], [parameter for _, parameter in named])
        for (stack, kind, _), named in members.items()
    ]


def _group_key(name: str, layers: Sequence[str]) -> tuple[str, str, str]:
    """Return a parameter's stack, its kind, and the index of its layer ("" outside of the layers)."""
    stack = next((layer for layer in layers if name.startswith(layer)), "")
    number, _, tail = name.removeprefix(stack).partition(".") if stack else ("", "", name)
    return stack, f"{stack}*.{INDEX_PATTERN.sub('#', tail)}", number


GradientOf = Callable[[nn.Parameter], Tensor | None]
"""Returns a parameter's gradient, or a tensor of the same norm; None if it has no gradient."""


def stored_gradient(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad


class GradientNorms:
    """Gradient norms from backward hooks, for engines that remove ``.grad`` (ZeRO shards it into buffers).

    Stores the norm of each gradient, summed over the backward passes since ``reset``.
    """

    def __init__(self, model: nn.Module) -> None:
        """Register a hook on each trained parameter."""
        self.norms: dict[nn.Parameter, Tensor] = {}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.handles = [
            parameter.register_hook(partial(self._accumulate, parameter))  # type: ignore[no-untyped-call]
            for parameter in trained
        ]

    def _accumulate(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        # float32: the sum of squares overflows float16. Only the norm is kept, not a copy of the gradient.
        norm = gradient.detach().float().norm()
        self.norms[parameter] = self.norms[parameter] + norm if parameter in self.norms else norm

    def __call__(self, parameter: nn.Parameter) -> Tensor | None:
        return self.norms.get(parameter)

    def reset(self) -> None:
        """Clear the sums, after each optimizer step."""
        self.norms.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def gradient_states(
    parameter_groups: Sequence[ParameterGroup], gradient_of: GradientOf = stored_gradient
) -> list[GradientState]:
    """Return each group's best state: frozen, no gradient, zero gradient, or nonzero gradient."""
    gradients = [(p, gradient_of(p)) for group in parameter_groups for p in group.parameters]
    # All norms at once: a device-to-host copy per parameter would synchronize thousands of times.
    norms = iter(_gradient_norms([gradient for _, gradient in gradients if gradient is not None]))
    best = {id(p): _gradient_state(p, gradient, norms) for p, gradient in gradients}
    return [max(best[id(parameter)] for parameter in group.parameters) for group in parameter_groups]


def _gradient_state(
    parameter: nn.Parameter, gradient: Tensor | None, norms: Iterator[float]
) -> GradientState:
    if gradient is not None:
        norm = next(norms)
        return NONZERO_GRADIENT if norm != 0 else ZERO_GRADIENT  # NaN and infinity are checked elsewhere
    return NO_GRADIENT if parameter.requires_grad else FROZEN


def _gradient_norms(tensors: Sequence[Tensor]) -> list[float]:
    """Return the tensors' norms, with a single device-to-host copy."""
    if not tensors:
        return []
    norms = [tensor.detach().float().norm() for tensor in tensors]
    # FSDP2's norms are partial sums over the shards until they are reduced.
    full_norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    values: list[float] = torch.stack(full_norms).tolist()
    return values


def check_gradient_flow(
    model: nn.Module, *, finite: bool = True, gradient_of: GradientOf = stored_gradient
) -> CheckResult:
    """Check, after a backward pass, that every trained tensor gets a gradient and no frozen one does.

    Args:
        model: base with adapter, after a backward pass.
        finite: whether NaN and infinity fail the check (with loss scaling the first ones may be infinite).
        gradient_of: returns a parameter's gradient.
    """
    all_groups = group_parameters(model)
    unused = _unused_stacks(all_groups, gradient_of)
    used_groups = [group for group in all_groups if group.stack not in unused]
    problems = [
        *_missing_gradients(used_groups, gradient_of),
        *_frozen_with_gradient(used_groups),
        *(_not_finite(used_groups) if finite else []),
    ]
    if problems:
        expected = "a gradient for every tensor of the adapter, and for none of the base"
        repair = (
            "if text does not use these layers (another modality's), exclude them with adapter.target; "
            "otherwise the adapter does not fit this model"
        )
        return failed(GRADIENT, Problem("adapter.method", "; ".join(problems), expected, repair))
    trained_states = [
        state
        for group, state in zip(used_groups, gradient_states(used_groups, gradient_of), strict=True)
        if state != FROZEN
    ]
    if all(state == ZERO_GRADIENT for state in trained_states):
        problem = Problem("adapter.method", "all gradients are zero", "an adapter with nonzero gradients")
        return failed(GRADIENT, problem)
    tensors = [parameter for group in used_groups for parameter in group.parameters]
    num_trained = sum(parameter.requires_grad for parameter in tensors)
    base = "; none in the base" if num_trained < len(tensors) else ""
    if dead := _names_below_others(used_groups, ZERO_GRADIENT, gradient_of):
        detail = f"zero for {len(dead)} of the trained tensors, unlike the same parameter in other layers"
        return CheckResult(GRADIENT, f"{detail}: {first_few(dead)}{base}", warned=True)
    names = first_few(sorted(stack.rstrip(".") for stack in unused))
    unused_note = f"; text does not use {names}: remove them from adapter.target" if unused else ""
    return CheckResult(
        GRADIENT,
        f"reaches all {num_trained} trained tensors{_zero_share(trained_states)}{base}{unused_note}",
        warned=bool(unused),
    )


def _unused_stacks(parameter_groups: Sequence[ParameterGroup], gradient_of: GradientOf) -> set[str]:
    """Return the stacks of layers whose trained tensors all lack a gradient while another stack has some."""
    best: dict[str, GradientState] = defaultdict(lambda: FROZEN)
    for group, state in zip(parameter_groups, gradient_states(parameter_groups, gradient_of), strict=True):
        best[group.stack] = max(best[group.stack], state)
    alive = any(state == NONZERO_GRADIENT for state in best.values())
    return {stack for stack, state in best.items() if alive and stack and state == NO_GRADIENT}


def _zero_share(trained_states: Sequence[GradientState]) -> str:
    share = sum(state == ZERO_GRADIENT for state in trained_states) / len(trained_states)
    return f" ({share:.0%} of them have a zero gradient at initialization, as expected)" if share else ""


def _missing_gradients(parameter_groups: Sequence[ParameterGroup], gradient_of: GradientOf) -> list[str]:
    """Return errors of groups without a gradient, or frozen unlike the same parameter elsewhere."""
    frozen = _names_below_others(parameter_groups, FROZEN, gradient_of)
    states = zip(parameter_groups, gradient_states(parameter_groups, gradient_of), strict=True)
    detached = [group.name for group, state in states if state == NO_GRADIENT]
    problems = []
    if frozen:
        comparison = "unlike the same parameter in other layers"
        problems.append(f"{len(frozen)} tensors are frozen, {comparison}: {first_few(frozen)}")
    if detached:
        problems.append(f"{len(detached)} tensors are without a gradient: {first_few(detached)}")
    return problems


def _names_below_others(
    parameter_groups: Sequence[ParameterGroup], state: GradientState, gradient_of: GradientOf
) -> list[str]:
    """Return the groups in a state whose parameter is in a higher one in another layer."""
    states = gradient_states(parameter_groups, gradient_of)
    # By kind: the best state that this parameter has in any layer.
    best: dict[str, GradientState] = defaultdict(lambda: FROZEN)
    for group, own_state in zip(parameter_groups, states, strict=True):
        best[group.kind] = max(best[group.kind], own_state)
    return [
        group.name
        for group, own_state in zip(parameter_groups, states, strict=True)
        if own_state == state < best[group.kind]
    ]


def _frozen_with_gradient(parameter_groups: Sequence[ParameterGroup]) -> list[str]:
    names = [
        group.name
        for group in parameter_groups
        if any(p.grad is not None and not p.requires_grad for p in group.parameters)
    ]
    return [f"{len(names)} frozen tensors got a gradient: {first_few(names)}"] if names else []


def _not_finite(parameter_groups: Sequence[ParameterGroup]) -> list[str]:
    named = [
        (group.name, p.grad) for group in parameter_groups for p in group.parameters if p.grad is not None
    ]
    norms = _gradient_norms([gradient for _, gradient in named])
    names = [name for (name, _), norm in zip(named, norms, strict=True) if not math.isfinite(norm)]
    return [f"{len(names)} gradients are NaN or infinite: {first_few(names)}"] if names else []
