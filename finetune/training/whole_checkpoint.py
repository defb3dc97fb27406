"""Full (unsharded) optimizer state in checkpoints of ZeRO and FSDP2, so that any number of processes resumes.

transformers' Trainer writes no optimizer for a model that it loaded sharded (FSDP2), and DeepSpeed writes
one file per rank. The files of a single-process run are written as well, in their names and formats.
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
"""An optimizer's initial param groups: parameters, learning rates and factors."""


class WholeCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Writes the full optimizer, scheduler and RNG state; runs before the callback that writes checksums."""

    def __init__(self, groups: Callable[[], Groups], *, strategy: str) -> None:
        """Bind the callback to a trainer.

        Args:
            param_groups: returns the optimizer's initial param groups, before an engine flattened them.
            strategy: ``fsdp2``, which writes none of these files, or ZeRO, which writes no full optimizer.
        """
        self.groups, self.strategy = groups, strategy

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the files; a collective, every rank must call it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        optimizer: Optimizer = kwargs["optimizer"]
        groups = self.groups()
        if self.strategy != "fsdp2" and not groups:
            return  # TRL's trainer: DeepSpeed's own files resume on the same number of processes
        whole = optimizer.state_dict() if self.strategy == "fsdp2" else _zero_states(groups, optimizer)
        if world().main:
            torch.save(whole, folder / OPTIMIZER_NAME)
        if self.strategy == "fsdp2":
            processes.wait()  # until rank 0 has made the folder
            torch.save(_random_states(), folder / f"rng_state_{world().rank}.pth")
            if world().main:
                torch.save(kwargs["lr_scheduler"].state_dict(), folder / SCHEDULER_NAME)


def refuse_other_parts(checkpoint: Path, *, strategy: str, processes: int) -> None:
    """Raise UserError if ZeRO cannot resume from a checkpoint with other shards than its own.

    Without ZeRO any number of processes resumes from any checkpoint.
    """
    if strategy not in ZERO:
        return
    parts = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    apart = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
    if parts == processes and apart == (strategy == "zero3"):
        return
    stage = "zero3" if apart else "zero1 or zero2"
    found = f"a checkpoint of {parts} processes under {stage}" if parts else "one without ZeRO shards"
    expected = f"one of {processes} processes under {strategy}: ZeRO reads only its own shards"
    repair = "train.strategy=ddp (one process: auto) resumes from it, or --force starts over"
    raise UserError(Problem(str(checkpoint), found, expected, repair))


def _zero_states(groups: Groups, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer state dict of a single-process run, gathered parameter by parameter."""
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
    """Return the names of the per-element optimizer states, and the number of optimizer steps."""
    first = next(iter(optimizer.state.values()))
    kinds = [kind for kind, value in first.items() if kind != "step" and torch.is_tensor(value)]
    return kinds, torch.as_tensor(first["step"], dtype=torch.float32).cpu()


def _weights(groups: Groups) -> Iterator[nn.Parameter]:
    for group in groups:
        yield from group["params"]


def _shape(weight: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 leaves an empty tensor in it
    return shape


def _random_states() -> dict[str, Any]:
    cuda = {"cuda": torch.cuda.random.get_rng_state_all()} if torch.cuda.is_available() else {}
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
        **cuda,
    }
