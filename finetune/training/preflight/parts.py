"""ZeRO and FSDP2 check: per-rank elements of weights and optimizer states, and distinct rows per rank.

Libraries have been seen to drop ZeRO silently: every rank then holds the full state and trains on the same
rows. The check runs after the first step, when the optimizer states exist.
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

NAME = "sharding"


@dataclass(frozen=True, slots=True)
class Part:
    """The elements that one rank stores, and the row ids of its first micro-batch.

    Attributes:
        weights: elements of the model's weights.
        states: elements of the largest optimizer state, such as Adam's first moments.
        rows: row ids of the first micro-batch.
    """

    weights: int
    states: int
    rows: tuple[int, ...] = ()


def part_of(model: nn.Module, optimizer: Optimizer, rows: Sequence[int] = ()) -> Part:
    """Count the elements that this rank stores."""
    settle(model)
    kinds: dict[str, int] = defaultdict(int)
    for state in optimizer.state.values():
        for kind, value in state.items():
            if torch.is_tensor(value):
                kinds[kind] += _here(value)
    weights = sum(map(numbers_here, model.parameters()))
    return Part(weights, max(kinds.values(), default=0), tuple(rows))


def parts_tick(parts: Sequence[Part], *, weights: int, trained: int, strategy: str) -> Tick:
    """Check that each rank stores only its shard, and that ranks train on different rows.

    Args:
        shares: the counts of each rank.
        weights: elements of the full model.
        trained: trained elements; each has its optimizer states.
        strategy: ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``.
    """
    wanted = {
        "weights": (strategy in APART, max(part.weights for part in parts), weights),
        "optimizer state elements": (strategy in ZERO, max(part.states for part in parts), trained),
    }
    kept = {name: (most, whole) for name, (asked, most, whole) in wanted.items() if asked}
    # Half-way between a shard and the total: shards are padded, so they may exceed 1/N by a little.
    wrong = [name for name, (most, whole) in kept.items() if most > whole * (1 + 1 / len(parts)) / 2]
    if wrong:
        found = "; ".join(f"a rank holds {kept[name][0]:,} of {kept[name][1]:,} {name}" for name in wrong)
        return failed(NAME, Problem("train.strategy", f"{strategy}, but {found}", f"1/{len(parts)} of them"))
    rows = [row for part in parts for row in part.rows]
    if len(rows) != len(set(rows)):
        found = "ranks train on the same rows in the first micro-batch"
        return failed(NAME, Problem("train.strategy", found, "different rows on each rank"))
    told = "; ".join(f"at most {most:,} of {whole:,} {name}" for name, (most, whole) in kept.items())
    return Tick(NAME, f"{strategy} is active: each rank holds {told}")


class Parts(TrainerCallback):  # type: ignore[misc]
    """Runs the sharding check after the first optimizer step."""

    def __init__(
        self, tell: Callable[[Tick], None], *, strategy: str, rows: Callable[[], Sequence[int]]
    ) -> None:
        """Bind the callback.

        Args:
            report: prints and records a check result, and raises if the check failed.
            strategy: distributed strategy.
            rows: returns the row ids of this rank's first micro-batch.
        """
        self.tell, self.strategy, self.rows = tell, strategy, rows
        self.looked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the check, once.

        Raises:
            UserError: a rank holds more than its shard, or trains on another rank's rows.
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
