"""Base of the native trainers: length-grouped batches, adapter hooks, NaN errors that name their rows.

Only public hooks of transformers' Trainer are overridden. Optimizer, scheduler, gradient accumulation,
precision, checkpoints and distribution are the library's; that is what makes a run resume bit for bit.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from finetune.adapters.traits import Hooks
from finetune.data.batches import MicroBatchSampler
from finetune.data.collate import IGNORE_INDEX
from finetune.distributed.interrupts import NotFiniteError
from finetune.distributed.rank import dist_info
from finetune.distributed.sharding import is_sharded
from finetune.training.adapter_hooks import AdapterCallback, scale_learning_rates
from finetune.training.metrics import as_logged
from finetune.training.save import write_adapter

NO_HOOKS = Hooks()


class TrainingRows(Protocol):
    """A training dataset: rows of any kind, with lengths in tokens and locations (``file:line``)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a row in the collator's input format."""
        ...

    @property
    def lengths(self) -> Iterable[int]:
        """Return the number of tokens of each row."""
        ...

    @property
    def locations(self) -> Sequence[str]:
        """Return the location (``file:line``) of each row."""
        ...


class PaddedRows(Dataset[tuple[Any, bool]]):
    """Dataset of (row, is_real): index ``~i`` is row ``i`` as padding, for a micro-batch without loss."""

    def __init__(self, rows: TrainingRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return (self.rows[index], True) if index >= 0 else (self.rows[~index], False)


class BaseTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose batches carry their row ids (``row_ids``); subclasses define the loss."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the labels of the step, not by accumulation steps

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_rows: TrainingRows,
        held_out_rows: TrainingRows | None,
        collator: Callable[[Sequence[Any]], Any],
        batch_size: int,
        group_by_length: bool,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        """Set up the trainer.

        Args:
            model: base with adapter.
            args: the engine's training arguments.
            train_rows: the training dataset.
            held_out_rows: the held-out dataset, if any.
            collator: rows to tensors.
            batch_size: rows per optimizer step.
            group_by_length: whether a batch holds rows of similar length.
            hooks: the adapter's callbacks during training.
        """
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            data_collator=collator,
        )
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the labels of all accumulated batches
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.hooks = hooks
        self.add_callback(AdapterCallback(hooks))
        self.num_tokens = 0
        self.first_row_ids: list[int] = []
        self.initial_param_groups: list[dict[str, Any]] = []
        self.lengths = [int(length) for length in train_rows.lengths]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer; an adapter may scale the learning rate of some of its parameters."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self.hooks.lr_factors:
            scale_learning_rates(optimizer, model or self.model, self.hooks)
        if is_new:
            # Drop empty groups, as DeepSpeed does: checkpoints have the same groups with and without it.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            # Copies: an engine may replace a group's parameters by flattened shards.
            self.initial_param_groups = [
                {**group, "params": list(group["params"])} for group in optimizer.param_groups
            ]
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the data loader of this rank's micro-batches, in an order fixed by seed and epoch."""
        batch_sampler = MicroBatchSampler(
            self.lengths,
            batch_size=self.batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed,
            group_by_length=self.group_by_length,
            dist=dist_info(),
        )
        rows = PaddedRows(self.train_dataset)
        loader = DataLoader(rows, batch_sampler=batch_sampler, collate_fn=self._collate)
        # num_processes=1: the sampler has sharded the rows, with equally many micro-batches on every rank.
        on_device: DataLoader[Any] = prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return on_device

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model of a checkpoint."""
        # PEFT would compute a prompt encoder's output on rank 0 only, which then waits forever for the other
        # ranks' shards: an adapter on a sharded base is written by all ranks together.
        if isinstance(self.model, PeftModel) and is_sharded(self.model):
            write_adapter(self.model, Path(output_dir or self.args.output_dir), main=dist_info().is_main)
        else:
            super().save_model(output_dir, _internal_call)

    def _collate(self, rows: Sequence[tuple[Any, bool]]) -> dict[str, Any]:
        """Return a micro-batch; a padding one has empty ``rows`` and no labels."""
        batch: dict[str, Any] = dict(self.data_collator([row for row, _ in rows]))
        # The sampler pads with complete micro-batches of one row, so that the first row decides.
        if not rows[0][1]:
            batch["rows"] = batch["rows"][:0]
            if "labels" in batch:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass.

        Raises:
            NotFiniteError: the loss is NaN or infinite; the message names the rows.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        row_ids = inputs["rows"].tolist()
        # For the sharding check: ranks must train on different rows.
        self.first_row_ids = self.first_row_ids or row_ids
        # On every micro-batch: a mean over the step would not tell which rows it came from.
        if not torch.isfinite(loss):
            locations = ", ".join(self.train_dataset.locations[row_id] for row_id in row_ids)
            raise NotFiniteError(
                f"loss is {loss.item()} at step {self.state.global_step + 1}, on {locations}"
            )
        # Padding micro-batches have no row ids and count nothing.
        self.num_tokens += sum(self.lengths[row_id] for row_id in row_ids)
        return loss


def first_row_ids(trainer: Trainer) -> list[int]:
    """Return the row ids of this rank's first micro-batch; empty for TRL's trainers, which record none."""
    return trainer.first_row_ids if isinstance(trainer, BaseTrainer) else []


def initial_param_groups(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the optimizer's initial param groups; empty for TRL's trainers, which record none."""
    return trainer.initial_param_groups if isinstance(trainer, BaseTrainer) else []


def log_held_out(trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
    """Log held-out metrics (``eval/...``) as ``eval_...``, call ``on_evaluate``; return what was logged."""
    logged = {as_logged(name): value for name, value in metrics.items()}
    trainer.log(logged)
    # on_evaluate clears control.should_evaluate; without it the trainer evaluates the same step twice.
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, logged
    )
    return logged
