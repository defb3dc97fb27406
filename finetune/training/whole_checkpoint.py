"""Checkpoints that any number of processes can go on from, where an engine writes its parts or none.

transformers' Trainer writes no optimizer for a model that it loaded in parts (FSDP2), and DeepSpeed writes
one file a process. Beside these the files of a run on one process are written, in their names and formats.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from finetune.planning.world import world
from finetune.recipe.errors import Problem, UserError
from finetune.training import processes
from finetune.training.strategies import ZERO

Groups = list[dict[str, Any]]
"""An optimizer's groups as they were made: parameters, rates and factors."""


class WholeCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Writes optimizer, schedule and random states whole; it must come before the callback that seals."""

    def __init__(self, groups: Callable[[], Groups], *, strategy: str) -> None:
        """Bind the callback.

        Args:
            groups: gives the optimizer's groups as they were made, before an engine flattened them.
            strategy: ``fsdp2``, which writes none of these files, or ZeRO, which lacks the optimizer whole.
        """
        self.groups, self.strategy = groups, strategy

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the files; every process takes part."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        optimizer: Optimizer = kwargs["optimizer"]
        groups = self.groups()
        if self.strategy != "fsdp2" and not groups:
            return  # TRL's trainer; DeepSpeed's own files serve as many processes again
        whole = optimizer.state_dict() if self.strategy == "fsdp2" else _zero_states(groups, optimizer)
        if world().main:
            torch.save(whole, folder / OPTIMIZER_NAME)
        if self.strategy == "fsdp2":
            processes.wait()  # until the folder is there
            torch.save(_random_states(), folder / f"rng_state_{world().rank}.pth")
            if world().main:
                torch.save(kwargs["lr_scheduler"].state_dict(), folder / SCHEDULER_NAME)


def refuse_other_parts(checkpoint: Path, *, strategy: str, processes: int) -> None:
    """Raise UserError where an engine cannot go on from a checkpoint: ZeRO reads its own parts alone.

    Without ZeRO any number of processes can go on from any checkpoint.
    """
    if strategy not in ZERO:
        return
    parts = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    apart = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
    if parts == processes and apart == (strategy == "zero3"):
        return
    stage = "zero3" if apart else "zero1 or zero2"
    found = f"a checkpoint of {parts} processes under {stage}" if parts else "one without ZeRO's parts"
    expected = f"one of {processes} processes under {strategy}: ZeRO reads its own parts alone"
    repair = "train.strategy=ddp (one process: auto) goes on from it, or --force starts over"
    raise UserError(Problem(str(checkpoint), found, expected, repair))


def _zero_states(groups: Groups, optimizer: Optimizer) -> dict[str, Any]:
    """Return what the optimizer would hold in one process, gathered parameter by parameter."""
    from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415 - not every run has it

    kinds, steps = _kinds(optimizer)
    states: dict[int, dict[str, Tensor]] = {}
    for index, weight in enumerate(_weights(groups)):
        found = {kind: safe_get_full_optimizer_state(weight, kind) for kind in kinds}
        shaped = {kind: value.detach().cpu().view(_shape(weight)).clone() for kind, value in found.items()}
        states[index] = shaped | {"step": steps}
    counted = iter(range(len(states)))
    return {
        "state": states,
        "param_groups": [
            {**live, "params": [next(counted) for _ in made["params"]]}
            for made, live in zip(groups, optimizer.param_groups, strict=True)
        ],
    }


def _kinds(optimizer: Optimizer) -> tuple[list[str], Tensor]:
    """Return the names of the states that each number has, and how often the optimizer stepped."""
    first = next(iter(optimizer.state.values()))
    kinds = [kind for kind, value in first.items() if kind != "step" and torch.is_tensor(value)]
    return kinds, torch.as_tensor(first["step"], dtype=torch.float32).cpu()


def _weights(groups: Groups) -> Iterator[nn.Parameter]:
    for group in groups:
        yield from group["params"]


def _shape(weight: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 leaves nothing in its place
    return shape


def _random_states() -> dict[str, Any]:
    cuda = {"cuda": torch.cuda.random.get_rng_state_all()} if torch.cuda.is_available() else {}
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
        **cuda,
    }
