"""Whether a model really lies in parts: what each process keeps of weights and optimizer states, counted.

Libraries have been seen to drop ZeRO without a word, and every process then keeps everything and learns the
same rows. So it is looked at behind the first step, when the states are there.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.recipe.errors import Problem
from finetune.training.apart import numbers, numbers_here, settle
from finetune.training.preflight.ticks import Tick, failed
from finetune.training.processes import everyones
from finetune.training.strategies import APART, ZERO

NAME = "parts"


@dataclass(frozen=True, slots=True)
class Part:
    """What one process keeps, in numbers, and the rows of its first pass.

    Attributes:
        weights: of the model's.
        states: of the largest kind of optimizer state, such as Adam's first moments.
        rows: learnt in the first pass that counted.
    """

    weights: int
    states: int
    rows: tuple[int, ...] = ()


def part_of(model: nn.Module, optimizer: Optimizer, rows: Sequence[int] = ()) -> Part:
    """Count what this process keeps."""
    settle(model)
    kinds: dict[str, int] = defaultdict(int)
    for state in optimizer.state.values():
        for kind, value in state.items():
            if torch.is_tensor(value):
                kinds[kind] += _here(value)
    weights = sum(map(numbers_here, model.parameters()))
    return Part(weights, max(kinds.values(), default=0), tuple(rows))


def parts_tick(parts: Sequence[Part], *, weights: int, trained: int, strategy: str) -> Tick:
    """Check that no process keeps the whole of what its strategy parts, and that none learns another's rows.

    Args:
        parts: what each process keeps.
        weights: numbers of the whole model.
        trained: those of them that are trained; each has its optimizer states.
        strategy: ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``.
    """
    wanted = {
        "weights": (strategy in APART, max(part.weights for part in parts), weights),
        "states of the optimizer": (strategy in ZERO, max(part.states for part in parts), trained),
    }
    kept = {name: (most, whole) for name, (asked, most, whole) in wanted.items() if asked}
    # Nearer to a part than to the whole: parts are rounded up, and differ by that.
    wrong = [name for name, (most, whole) in kept.items() if most > whole * (1 + 1 / len(parts)) / 2]
    if wrong:
        found = "; ".join(f"a process keeps {kept[name][0]:,} of {kept[name][1]:,} {name}" for name in wrong)
        return failed(NAME, Problem("train.strategy", f"{strategy}, but {found}", f"1/{len(parts)} of them"))
    rows = [row for part in parts for row in part.rows]
    if len(rows) != len(set(rows)):
        found = "processes learn the same rows in the first pass"
        return failed(NAME, Problem("train.strategy", found, "other rows in each process"))
    told = "; ".join(f"at most {most:,} of {whole:,} {name}" for name, (most, whole) in kept.items())
    return Tick(NAME, f"{strategy} has parted the model: a process keeps {told}")


class Parts(TrainerCallback):  # type: ignore[misc]
    """Looks behind the first step whether the model lies in parts."""

    def __init__(
        self, tell: Callable[[Tick], None], *, strategy: str, rows: Callable[[], Sequence[int]]
    ) -> None:
        """Bind the look.

        Args:
            tell: takes a check, and raises when it failed.
            strategy: how processes share the model.
            rows: gives the rows of the first pass that counted.
        """
        self.tell, self.strategy, self.rows = tell, strategy, rows
        self.looked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count, once.

        Raises:
            UserError: a process keeps everything, or learns another's rows.
        """
        if self.looked:
            return
        self.looked = True
        model: nn.Module = kwargs["model"]
        found = everyones(part_of(model, kwargs["optimizer"], self.rows()))
        weights = list(model.parameters())
        self.tell(
            parts_tick(
                found,
                weights=sum(map(numbers, weights)),
                trained=sum(numbers(weight) for weight in weights if weight.requires_grad),
                strategy=self.strategy,
            )
        )


def _here(value: Tensor) -> int:
    return value.to_local().numel() if isinstance(value, DTensor) else value.numel()
