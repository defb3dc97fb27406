"""The native engine: transformers' Trainer with our loss, our batches and our held-out measure.

Only public hooks are overridden. Optimizer, schedule, accumulation, precision, checkpoints and distribution
stay the library's; that is what makes a run resume bit for bit.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from finetune.adapters._traits import Hooks
from finetune.data.batches import MicroBatches
from finetune.data.collate import IGNORED, Collator
from finetune.data.dataset import TokenizedRows
from finetune.training.adapter_hooks import AdapterCallback, scale_learning_rates
from finetune.training.completion import completion_loss_sum, held_out_loss
from finetune.training.head import output_head
from finetune.training.neftune import noisy_embeddings
from finetune.training.stops import NotFiniteError

NO_HOOKS = Hooks()


class NativeTrainer(Trainer):  # type: ignore[misc]
    """Computes the head only where a label is, on batches of similar length."""

    loss_is_scaled_for_ga = True
    label_smoothing: float = 0.0
    neftune_alpha: float | None = None

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_rows: TokenizedRows,
        held_out_rows: TokenizedRows | None,
        collator: Collator,
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
            collator: padded or packed.
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
        self.model_accepts_loss_kwargs = True  # the Trainer then counts the labels of all accumulated batches
        self.head = output_head(self.accelerator.unwrap_model(model))
        self.embeddings: nn.Module = self.accelerator.unwrap_model(model).get_input_embeddings()
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.hooks = hooks
        self.add_callback(AdapterCallback(hooks))
        self.num_tokens = 0
        self.lengths = train_rows.lengths

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer; an adapter may ask for other learning rates on some of its parameters."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self.hooks.rate_factors:
            scale_learning_rates(optimizer, model or self.model, self.hooks)
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of forward passes, in the order that seed and epoch give."""
        batches = MicroBatches(
            self.lengths,
            batch_size=self.batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed,
            group_by_length=self.group_by_length,
        )
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the summed loss of this forward pass over the number of labels in the whole optimizer step.

        These quotients add up to the mean over all labels of the step, however it is cut into forward
        passes and over processes (whose gradients are averaged, hence the factor).
        """
        assert num_items_in_batch is not None and not return_outputs
        with noisy_embeddings(self.embeddings, self.neftune_alpha, inputs):
            loss_sum = completion_loss_sum(
                model, self.head, inputs, passes=self.hooks.passes, label_smoothing=self.label_smoothing
            )
        if self.hooks.penalty:  # its share of the step is that of this pass's labels
            loss_sum = loss_sum + self.hooks.penalty() * (inputs["labels"] != IGNORED).sum()
        loss: Tensor = loss_sum / num_items_in_batch * self.accelerator.num_processes
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass; stop the run when its loss is no number.

        Raises:
            NotFiniteError: NaN or infinite loss; the message names the rows.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        rows = inputs["rows"].tolist()
        if not torch.isfinite(loss):
            places = ", ".join(self.train_dataset.places[row] for row in rows)
            raise NotFiniteError(f"loss is {loss.item()} at step {self.state.global_step + 1}, on {places}")
        self.num_tokens += sum(self.lengths[row] for row in rows)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the mean loss per label on the held-out rows; no logits are kept."""
        size = self.args.per_device_train_batch_size
        loss = held_out_loss(self.model, self.eval_dataset, self.data_collator, lines=size)
        return log_held_out_loss(self, loss)


def log_held_out_loss(trainer: Trainer, loss: float) -> dict[str, float]:
    """Log a held-out loss and tell the callbacks, or the trainer measures the same step twice."""
    metrics = {"held_out_loss": loss}
    trainer.log(metrics)
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics
    )
    return metrics
