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

from finetune.adapters._traits import Hooks
from finetune.data.batches import MicroBatches
from finetune.data.collate import IGNORED
from finetune.planning.world import world
from finetune.training.adapter_hooks import AdapterCallback, scale_learning_rates
from finetune.training.apart import in_parts
from finetune.training.save import write_adapter
from finetune.training.stops import NotFiniteError

NO_HOOKS = Hooks()


class Rows(Protocol):
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
    def places(self) -> Sequence[str]:
        """Return the location (``file:line``) of each row."""
        ...


class Counted(Dataset[tuple[Any, bool]]):
    """Dataset of (row, is_real): index ``~i`` is row ``i`` as padding, for a micro-batch without loss."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Any, bool]:
        return (self.rows[number], True) if number >= 0 else (self.rows[~number], False)


class BaseTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose batches carry their row ids (``rows``); subclasses define the loss."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the labels of the step, not by accumulation steps

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_rows: Rows,
        held_out_rows: Rows | None,
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
        self.first_rows: list[int] = []
        self.groups: list[dict[str, Any]] = []
        self.lengths = [int(length) for length in train_rows.lengths]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer; an adapter may scale the learning rate of some of its parameters."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self.hooks.rate_factors:
            scale_learning_rates(optimizer, model or self.model, self.hooks)
        if fresh:
            # Drop empty groups, as DeepSpeed does: checkpoints have the same groups with and without it.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            self.groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the data loader of this rank's micro-batches, in an order fixed by seed and epoch."""
        batches = MicroBatches(
            self.lengths,
            batch_size=self.batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed,
            group_by_length=self.group_by_length,
            world=world(),
        )
        rows = Counted(self.train_dataset)
        loader = DataLoader(rows, batch_sampler=batches, collate_fn=self._collate)
        # num_processes=1: the sampler has sharded the rows, with equally many micro-batches on every rank.
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model of a checkpoint."""
        # PEFT would compute a prompt encoder's output on rank 0 only, which then waits forever for the other
        # ranks' shards: an adapter on a sharded base is written by all ranks together.
        if isinstance(self.model, PeftModel) and in_parts(self.model):
            write_adapter(self.model, Path(output_dir or self.args.output_dir), main=world().main)
        else:
            super().save_model(output_dir, _internal_call)

    def _collate(self, rows: Sequence[tuple[Any, bool]]) -> dict[str, Any]:
        """Return a micro-batch; a padding one has empty ``rows`` and no labels."""
        batch: dict[str, Any] = dict(self.data_collator([row for row, _ in rows]))
        if not rows[0][1]:
            batch["rows"] = batch["rows"][:0]
            if "labels" in batch:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass.

        Raises:
            NotFiniteError: the loss is NaN or infinite; the message names the rows.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        rows = inputs["rows"].tolist()
        self.first_rows = self.first_rows or rows
        if not torch.isfinite(loss):
            places = ", ".join(self.train_dataset.places[row] for row in rows)
            raise NotFiniteError(f"loss is {loss.item()} at step {self.state.global_step + 1}, on {places}")
        self.num_tokens += sum(self.lengths[row] for row in rows)
        return loss


def first_rows(trainer: Trainer) -> list[int]:
    """Return the row ids of this rank's first micro-batch; empty for TRL's trainers, which record none."""
    return trainer.first_rows if isinstance(trainer, BaseTrainer) else []


def groups(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the optimizer's initial param groups; empty for TRL's trainers, which record none."""
    return trainer.groups if isinstance(trainer, BaseTrainer) else []


def log_held_out(trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
    """Log held-out metrics and call the callbacks' ``on_evaluate``."""
    trainer.log(metrics)
    # on_evaluate clears control.should_evaluate; without it the trainer evaluates the same step twice.
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics
    )
    return metrics
