"""Native trainers: the base of all (batches, adapter hooks, NaN errors that name their rows), and SFT's.

Only public hooks of transformers' Trainer are overridden. Optimizer, gradient accumulation, precision,
checkpoints and distribution are the library's; that is what makes a run resume bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
from finetune.training.loss import completion_loss_sum, held_out_loss, output_head
from finetune.training.metrics import EVAL_PREFIX, as_logged
from finetune.training.save import write_adapter
from finetune.training.schedule import ScheduledTrainer

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


@dataclass(frozen=True)
class TrainerData:
    """The rows of a native trainer, and how they become batches.

    Attributes:
        train: the training dataset.
        held_out: the held-out dataset, if any.
        collator: rows to tensors.
        batch_size: rows per optimizer step.
        group_by_length: whether a batch holds rows of similar length.
    """

    train: TrainingRows
    held_out: TrainingRows | None
    collator: Callable[[Sequence[Any]], Any]
    batch_size: int
    group_by_length: bool


class PaddedRows(Dataset[tuple[Any, bool]]):
    """Dataset of (row, is_real): index ``~i`` is row ``i`` as padding, for a micro-batch without loss."""

    def __init__(self, rows: TrainingRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return (self.rows[index], True) if index >= 0 else (self.rows[~index], False)


class BaseTrainer(ScheduledTrainer):
    """A Trainer whose batches carry their row ids (``row_ids``); subclasses define the loss."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the labels of the step, not by accumulation steps

    def __init__(
        self, model: nn.Module, args: TrainingArguments, data: TrainerData, *, hooks: Hooks = NO_HOOKS
    ) -> None:
        """Set up the trainer.

        Args:
            model: base with adapter.
            args: the engine's training arguments.
            data: the rows and their batching.
            hooks: the adapter's callbacks during training.
        """
        super().__init__(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            data_collator=data.collator,
        )
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the labels of all accumulated batches
        self.batch_size = data.batch_size
        self.group_by_length = data.group_by_length
        self.hooks = hooks
        self.add_callback(AdapterCallback(hooks))
        self.num_tokens = 0
        self.first_row_ids: list[int] = []
        self.initial_param_groups: list[dict[str, Any]] = []
        self.lengths = [int(length) for length in data.train.lengths]

    def held_out_metrics(self) -> dict[str, float]:
        """Return the metrics of the held-out rows; a run without such rows does not ask for them."""
        raise NotImplementedError

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out metrics, which the Trainer asks for between steps."""
        return log_held_out(self, self.held_out_metrics())

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
        """Return a micro-batch; a padding one has empty ``row_ids`` and no labels."""
        batch: dict[str, Any] = dict(self.data_collator([row for row, _ in rows]))
        # The sampler pads with complete micro-batches of one row, so that the first row decides.
        if not rows[0][1]:
            batch["row_ids"] = batch["row_ids"][:0]
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
        row_ids = inputs["row_ids"].tolist()
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
    """Log held-out metrics as ``eval_...``, call ``on_evaluate``; return what was logged."""
    logged = {as_logged(f"{EVAL_PREFIX}{name}"): value for name, value in metrics.items()}
    trainer.log(logged)
    # on_evaluate clears control.should_evaluate; without it the trainer evaluates the same step twice.
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, logged
    )
    return logged


class NativeTrainer(BaseTrainer):
    """Applies the LM head only at positions that predict a label, on length-grouped batches."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data: TrainerData,
        *,
        hooks: Hooks = NO_HOOKS,
        label_smoothing: float = 0.0,
        neftune_alpha: float | None = None,
    ) -> None:
        """Set up the trainer; ``neftune_alpha`` scales NEFTune's noise (None: no noise)."""
        super().__init__(model, args, data, hooks=hooks)
        self.label_smoothing = label_smoothing
        self.neftune_alpha = neftune_alpha

    @cached_property
    def head(self) -> nn.Module:
        # The engine's wrapper (DDP, DeepSpeed) does not have the model's methods.
        return output_head(self.accelerator.unwrap_model(self.model))

    @cached_property
    def embeddings(self) -> nn.Module:
        module: nn.Module = self.accelerator.unwrap_model(self.model).get_input_embeddings()
        return module

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the micro-batch's summed loss divided by the number of labels in the optimizer step.

        Summed over micro-batches and ranks this is the mean over all labels of the step, however the step is
        split.
        """
        assert num_items_in_batch is not None and not return_outputs
        with noisy_embeddings(self.embeddings, self.neftune_alpha, inputs):
            loss_sum = self.loss_sum(model, inputs)
        if self.hooks.penalty:  # weighted by this micro-batch's share of the step's labels
            loss_sum = loss_sum + self.hooks.penalty() * (inputs["labels"] != IGNORE_INDEX).sum()
        # num_items_in_batch counts the labels of all ranks, whose gradients are averaged: undo that division.
        loss: Tensor = loss_sum / num_items_in_batch * self.accelerator.num_processes
        return loss

    def loss_sum(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the micro-batch's loss, summed over its labels; another supervised loss overrides this."""
        return completion_loss_sum(
            model,
            self.head,
            inputs,
            num_passes=self.hooks.forward_passes,
            label_smoothing=self.label_smoothing,
        )

    def held_out_metrics(self) -> dict[str, float]:
        """Return the mean loss per label on the held-out rows."""
        size = self.args.per_device_train_batch_size
        return {"loss": held_out_loss(self.model, self.eval_dataset, self.data_collator, batch_size=size)}


@contextmanager
def noisy_embeddings(
    embeddings: nn.Module, alpha: float | None, batch: Mapping[str, Tensor]
) -> Iterator[None]:
    r"""Add NEFTune noise to the embeddings' output inside the block; no change without alpha.

    Jain et al. 2023 (arXiv 2310.05914), algorithm 1: X' = X + (alpha / sqrt(L d)) u, u ~ U(-1, 1)^(L x d),
    with L the row's tokens and d the hidden size. transformers and TRL count padding in L, so that their
    noise depends on the other rows of the batch; here it does not, and packed rows have the noise of padded
    ones.

    Args:
        embeddings: the model's input embeddings.
        alpha: scale of the noise.
        batch: a collator's output.
    """
    if alpha is None:
        yield
        return
    lengths = row_lengths(batch)

    def add_noise(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scale = alpha / torch.sqrt(lengths * output.shape[-1])
        noise = torch.empty_like(output).uniform_(-1.0, 1.0)  # torch's global RNG, saved in each checkpoint
        return output + noise * scale.unsqueeze(-1).to(output.dtype)

    handle = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def row_lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """Return for each token the length of its row (in a packed batch: of its text).

    Args:
        batch: with ``attention_mask`` (padded) or ``position_ids`` (packed) of shape (B, T).

    Returns:
        (B, T), float; in a packed batch padding counts as a separate text.
    """
    if "attention_mask" in batch:
        mask_BT = batch["attention_mask"]
        return mask_BT.sum(dim=1, keepdim=True).expand_as(mask_BT).float()
    position_ids_BT = batch["position_ids"]
    # A position id of 0 begins a text of a packed row.
    text_index_BT = (position_ids_BT == 0).cumsum(dim=1) - 1
    lengths_BT = torch.zeros_like(text_index_BT).scatter_add_(
        1, text_index_BT, torch.ones_like(text_index_BT)
    )
    return lengths_BT.gather(1, text_index_BT).float()
