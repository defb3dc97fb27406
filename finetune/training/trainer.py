"""The native engine of supervised tuning: our loss on our batches, and our held-out measure."""

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from finetune.data.collate import IGNORED
from finetune.training.base_trainer import BaseTrainer, log_held_out
from finetune.training.completion import completion_loss_sum, held_out_loss
from finetune.training.head import output_head
from finetune.training.neftune import noisy_embeddings


class NativeTrainer(BaseTrainer):
    """Computes the head only where a label is, on batches of similar length."""

    label_smoothing: float = 0.0
    neftune_alpha: float | None = None

    @cached_property
    def head(self) -> nn.Module:
        """Return the model's output embeddings."""
        return output_head(self.accelerator.unwrap_model(self.model))

    @cached_property
    def embeddings(self) -> nn.Module:
        """Return the model's input embeddings."""
        module: nn.Module = self.accelerator.unwrap_model(self.model).get_input_embeddings()
        return module

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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the mean loss per label on the held-out rows; no logits are kept."""
        size = self.args.per_device_train_batch_size
        loss = held_out_loss(self.model, self.eval_dataset, self.data_collator, lines=size)
        return log_held_out(self, {"held_out_loss": loss})
