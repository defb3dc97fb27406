"""Native DPO trainer: shared-prompt groups, one loss per group, precomputed or live reference."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.dpo.collate import PreferenceCollator, PreferenceDataset
from align.dpo.forward import ForwardLosses, forward_losses
from align.dpo.objective import MetricAverager, PreferenceObjective, mean_preference_metrics
from align.preference.group_trainer import GroupTrainer
from align.preference.reference_policy import ReferencePolicy, autocast_for
from finetune.distributed.collectives import all_gather_object, shard_padded
from finetune.training.head import output_head
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.trainer import log_held_out


class PreferenceTrainer(GroupTrainer):
    """Trainer of preference losses; a row is a group, and batch sizes count groups."""

    objective: PreferenceObjective
    reference_policy: ReferencePolicy | None = None
    precision: str = "float32"

    @cached_property
    def head(self) -> nn.Module:
        return output_head(self.accelerator.unwrap_model(self.model))

    @cached_property
    def averager(self) -> MetricAverager:
        """Return the averager of the metrics since the last log."""
        return MetricAverager()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this micro-batch's contribution to the mean loss over the groups of the optimizer step."""
        assert num_items_in_batch is not None and not return_outputs
        # NaN marks groups for which no reference was computed (`rows_seen_by_run`).
        has_reference = "reference_logps" not in inputs or not inputs["reference_logps"].isnan().any()
        assert has_reference, "a step uses groups without precomputed reference log-probabilities"
        outputs = forward_losses(
            model, self.head, inputs, objective=self.objective, reference_policy=self.reference_policy
        )
        # A padding micro-batch has no row ids: it only keeps the ranks in step and counts for nothing.
        num_real = len(inputs["rows"])
        self.averager.add({name: values[:num_real] for name, values in outputs.metrics.items()})
        return self.step_loss(outputs.losses[:num_real], num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's values and the metric means since the last logged loss."""
        # Only entries of training steps, which all ranks log together: the gather is a collective.
        if "loss" in logs and self.averager.sums:
            means = mean_preference_metrics(all_gather_object(self.averager.pop_sums()))
            # The Trainer's own loss stays: it includes the adapter's penalty.
            logs |= {name: value for name, value in means.items() if name != "loss"}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the metrics on the held-out groups; no logits are gathered."""
        metrics = self.held_out_metrics(self.eval_dataset)
        return log_held_out(self, {f"{EVAL_PREFIX}{name}": value for name, value in metrics.items()})

    @torch.no_grad()
    def held_out_metrics(self, rows: PreferenceDataset) -> dict[str, float]:
        """Return the metric means over all groups of ``rows``, without dropout, sharded over processes."""
        averager, batch_size = MetricAverager(), self.args.per_device_train_batch_size
        training = self.model.training
        self.model.eval()
        # By length, so that a batch has little padding.
        order = np.argsort(rows.lengths, kind="stable").tolist()
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for row_ids, is_real in shard_padded(batches):
            metrics = self.forward_rows(rows, row_ids).metrics
            # A padding batch only keeps the ranks in step: it is computed and not counted.
            averager.add(metrics if is_real else {name: values[:0] for name, values in metrics.items()})
        self.model.train(training)
        return mean_preference_metrics(all_gather_object(averager.pop_sums()))

    def forward_rows(self, rows: PreferenceDataset, row_ids: list[int]) -> ForwardLosses:
        """Return losses and metrics of some groups, with the collator and the loss of training."""
        assert isinstance(self.data_collator, PreferenceCollator)
        batch = self.data_collator([rows[row_id] for row_id in row_ids])
        device = next(self.model.parameters()).device
        on_device = {name: value.to(device) for name, value in batch.items()}
        with autocast_for(self.model, self.precision):
            return forward_losses(
                self.model,
                self.head,
                on_device,
                objective=self.objective,
                reference_policy=self.reference_policy,
            )
