"""What the native trainers share: batches of similar length, an adapter's hooks, a NaN that names its rows.

Only public hooks of transformers' Trainer are overridden. Optimizer, schedule, accumulation, precision,
checkpoints and distribution stay the library's; that is what makes a run resume bit for bit.
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
    """What is learnt: rows of any kind, with their lengths in tokens and their places (``file:line``)."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a row, as the collator takes it."""
        ...

    @property
    def lengths(self) -> Iterable[int]:
        """Return the tokens of each row."""
        ...

    @property
    def places(self) -> Sequence[str]:
        """Return where each row comes from."""
        ...


class Counted(Dataset[tuple[Any, bool]]):
    """Rows, each with whether it counts: row ``~number`` is row ``number`` in a pass that only keeps step."""

    def __init__(self, rows: Rows) -> None:
        """Wrap rows of any kind."""
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Any, bool]:
        """Return a row as the collator takes it, and whether it counts."""
        return (self.rows[number], True) if number >= 0 else (self.rows[~number], False)


class BaseTrainer(Trainer):  # type: ignore[misc]
    """A trainer whose batches carry ``rows``, the numbers of the rows in them; the loss is a subclass's."""

    loss_is_scaled_for_ga = True

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
            args: the engine's arguments.
            train_rows: what is learnt.
            held_out_rows: what is measured, if anything.
            collator: rows to tensors.
            batch_size: rows of an optimizer step.
            group_by_length: whether rows of similar length meet.
            hooks: what the adapter does while it trains.
        """
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            data_collator=collator,
        )
        self.model_accepts_loss_kwargs = True  # the Trainer then counts the items of all accumulated batches
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.hooks = hooks
        self.add_callback(AdapterCallback(hooks))
        self.num_tokens = 0
        self.first_rows: list[int] = []
        self.groups: list[dict[str, Any]] = []
        self.lengths = [int(length) for length in train_rows.lengths]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer; an adapter may ask for other learning rates on some of its parameters."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self.hooks.rate_factors:
            scale_learning_rates(optimizer, model or self.model, self.hooks)
        if fresh:
            # Empty ones go, as with DeepSpeed: checkpoints then have as many with and without it.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            self.groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process's forward passes, in the order that seed and epoch give."""
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
        # Shared out already, so that every process has as many passes of each step.
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model of a checkpoint; adapters whose base lies in parts are written by all processes.

        PEFT would make a prompt with rank 0 alone, which would wait for the others' parts for ever.
        """
        if isinstance(self.model, PeftModel) and in_parts(self.model):
            write_adapter(self.model, Path(output_dir or self.args.output_dir), main=world().main)
        else:
            super().save_model(output_dir, _internal_call)

    def _collate(self, rows: Sequence[tuple[Any, bool]]) -> dict[str, Any]:
        """Return a forward pass; one that does not count has no ``rows``, and no label of it is learnt."""
        batch: dict[str, Any] = dict(self.data_collator([row for row, _ in rows]))
        if not rows[0][1]:
            batch["rows"] = batch["rows"][:0]
            if "labels" in batch:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass; stop the run when its loss is no number.

        Raises:
            NotFiniteError: NaN or infinite loss; the message names the rows.
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
    """Return the rows of this process's first pass that counted; none where TRL's trainer does not say."""
    return trainer.first_rows if isinstance(trainer, BaseTrainer) else []


def groups(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the optimizer's groups as they were made; none where TRL's trainer does not say."""
    return trainer.groups if isinstance(trainer, BaseTrainer) else []


def log_held_out(trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
    """Log held-out metrics and tell the callbacks, or the trainer measures the same step twice."""
    trainer.log(metrics)
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics
    )
    return metrics
