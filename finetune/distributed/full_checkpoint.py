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

from finetune.distributed import collectives
from finetune.distributed.rank import dist_info
from finetune.distributed.strategies import ZERO_STAGES
from finetune.library_internals import zero3_full_shape
from finetune.recipe.errors import Problem, UserError

ParamGroups = list[dict[str, Any]]
"""An optimizer's initial param groups: parameters, learning rates and factors."""


class FullStateCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Writes the full optimizer, scheduler and RNG state; runs before the callback that writes checksums."""

    def __init__(self, param_groups: Callable[[], ParamGroups], *, strategy: str) -> None:
        """Bind the callback to a trainer.

        Args:
            param_groups: returns the optimizer's initial param groups, before an engine flattened them.
            strategy: ``fsdp2``, which writes none of these files, or ZeRO, which writes no full optimizer.
        """
        self.param_groups, self.strategy = param_groups, strategy

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the files; a collective, every rank must call it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        optimizer: Optimizer = kwargs["optimizer"]
        param_groups = self.param_groups()
        if self.strategy != "fsdp2" and not param_groups:
            return  # TRL's trainer: DeepSpeed's own files resume on the same number of processes
        # FSDP2 trains adapters alone (`fsdp2-full` refuses the rest), and every rank has all of their states.
        full_state = (
            optimizer.state_dict()
            if self.strategy == "fsdp2"
            else _gather_optimizer_state(param_groups, optimizer)
        )
        if dist_info().is_main:
            torch.save(full_state, folder / OPTIMIZER_NAME)
        if self.strategy == "fsdp2":
            collectives.barrier()  # until rank 0 has made the folder
            # The file name and keys that transformers' Trainer reads when it resumes on several processes.
            torch.save(_rng_state(), folder / f"rng_state_{dist_info().rank}.pth")
            if dist_info().is_main:
                torch.save(kwargs["lr_scheduler"].state_dict(), folder / SCHEDULER_NAME)


def check_resharding(checkpoint: Path, *, strategy: str, num_processes: int) -> None:
    """Raise UserError if ZeRO cannot resume from a checkpoint with other shards than its own.

    Without ZeRO any number of processes resumes from any checkpoint.
    """
    if strategy not in ZERO_STAGES:
        return
    # DeepSpeed's file names: an optimizer file per rank, and a model file per rank only if weights are
    # sharded.
    num_shards = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    weights_sharded = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
    if num_shards == num_processes and weights_sharded == (strategy == "zero3"):
        return
    saved_strategy = "zero3" if weights_sharded else "zero1 or zero2"
    actual = (
        f"a checkpoint of {num_shards} processes under {saved_strategy}"
        if num_shards
        else "one without ZeRO shards"
    )
    expected = f"one of {num_processes} processes under {strategy}: ZeRO reads only its own shards"
    repair = "train.strategy=ddp (one process: auto) resumes from it, or --force starts over"
    raise UserError(Problem(str(checkpoint), actual, expected, repair))


def _gather_optimizer_state(param_groups: ParamGroups, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer state dict of a single-process run, gathered parameter by parameter."""
    from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415 - not every run has it

    state_names, step = _optimizer_state_names(optimizer)
    states: dict[int, dict[str, Tensor]] = {}
    # One parameter at a time, straight to the CPU: the full optimizer state need not fit on a GPU.
    for index, param in enumerate(_params(param_groups)):
        full = {name: safe_get_full_optimizer_state(param, name) for name in state_names}
        reshaped = {
            name: value.detach().cpu().view(zero3_full_shape(param)).clone() for name, value in full.items()
        }
        states[index] = reshaped | {"step": step}
    # torch's state_dict format numbers parameters across all groups.
    next_index = iter(range(len(states)))
    return {
        "state": states,
        "param_groups": [
            {**current, "params": [next(next_index) for _ in initial["params"]]}
            for initial, current in zip(param_groups, optimizer.param_groups, strict=True)
        ],
    }


def _optimizer_state_names(optimizer: Optimizer) -> tuple[list[str], Tensor]:
    """Return the names of the per-element optimizer states, and the number of optimizer steps."""
    first_state = next(iter(optimizer.state.values()))
    names = [name for name, value in first_state.items() if name != "step" and torch.is_tensor(value)]
    return names, torch.as_tensor(first_state["step"], dtype=torch.float32).cpu()


def _params(param_groups: ParamGroups) -> Iterator[nn.Parameter]:
    for group in param_groups:
        yield from group["params"]


def _rng_state() -> dict[str, Any]:
    cuda = {"cuda": torch.cuda.random.get_rng_state_all()} if torch.cuda.is_available() else {}
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
        **cuda,
    }
