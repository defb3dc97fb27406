"""The native SFT trainer: cross-entropy over a step's labels, label smoothing, NEFTune, held-out loss."""

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from finetune.data.collate import IGNORE_INDEX
from finetune.training.base_trainer import BaseTrainer, log_held_out
from finetune.training.batch_loss import completion_loss_sum, held_out_loss
from finetune.training.head import output_head
from finetune.training.neftune import noisy_embeddings


class NativeTrainer(BaseTrainer):
    """Applies the LM head only at positions that predict a label, on length-grouped batches."""

    label_smoothing: float = 0.0
    neftune_alpha: float | None = None

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
            loss_sum = completion_loss_sum(
                model,
                self.head,
                inputs,
                num_passes=self.hooks.forward_passes,
                label_smoothing=self.label_smoothing,
            )
        if self.hooks.penalty:  # weighted by this micro-batch's share of the step's labels
            loss_sum = loss_sum + self.hooks.penalty() * (inputs["labels"] != IGNORE_INDEX).sum()
        # num_items_in_batch counts the labels of all ranks, whose gradients are averaged: undo that division.
        loss: Tensor = loss_sum / num_items_in_batch * self.accelerator.num_processes
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the mean loss per label on the held-out rows."""
        size = self.args.per_device_train_batch_size
        loss = held_out_loss(self.model, self.eval_dataset, self.data_collator, batch_size=size)
        return log_held_out(self, {"eval/loss": loss})
