"""Native DPO trainer: shared-prompt groups, one loss per group, precomputed or live reference.

A step: the collator's batch (``collate.py``) goes through policy and reference (``forward_losses``), the
objective turns log-probabilities into a loss per group, and the step's loss is the mean over its groups.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.dpo.collate import PreferenceCollator, PreferenceDataset
from align.dpo.objective import (
    GroupLosses,
    MetricAverager,
    PreferenceObjective,
    mean_preference_metrics,
    pad_by_group,
    preference_metrics,
)
from align.preference.group_trainer import GroupTrainer
from align.preference.logps import token_logps
from align.preference.losses.inputs import Lists
from align.preference.reference_policy import ReferencePolicy, autocast_for
from finetune.adapters.traits import Hooks
from finetune.distributed.collectives import all_gather_object, shard_padded
from finetune.recipe.settings import StageSettings
from finetune.training.context import RunContext
from finetune.training.loss import output_head
from finetune.training.metrics import EVAL_PREFIX, as_logged
from finetune.training.trainer import NO_HOOKS, TrainerData

HELD_OUT_CHOSEN_LOGPS = f"{EVAL_PREFIX}logps/chosen"


class ForwardLosses(NamedTuple):
    """Losses per group with gradient, and metrics per group without, (G,) each."""

    losses: Tensor
    metrics: dict[str, Tensor]


def forward_losses(
    model: nn.Module,
    head: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    objective: PreferenceObjective,
    reference_policy: ReferencePolicy | None = None,
) -> ForwardLosses:
    """Return the losses and metrics of a batch.

    Args:
        model: the policy, in any wrapper.
        head: its output embeddings.
        batch: from ``PreferenceCollator``, on the model's device.
        objective: the loss.
        reference_policy: the live reference; None if its log-probabilities are in the batch or not needed.
    """
    reference_CT = (
        batch.get("reference_logps")
        if reference_policy is None
        else reference_policy.logps(model, head, batch)
    )
    # After the reference: its weight swap needs that no autograd graph of the policy is alive.
    logps_CT = token_logps(model, head, batch)
    lists = to_lists(logps_CT, reference_CT, batch)
    group_losses: GroupLosses = objective(lists)
    return ForwardLosses(
        group_losses.losses, preference_metrics(lists, group_losses, logps_CT, reference_CT, batch["sizes"])
    )


def to_lists(logps_CT: Tensor, reference_CT: Tensor | None, batch: Mapping[str, Tensor]) -> Lists:
    """Return the loss inputs (G, K), from token log-probabilities (C, T)."""
    sizes = batch["sizes"]
    return Lists(
        logps=pad_by_group(logps_CT.sum(1), sizes),
        lengths=pad_by_group(batch["lengths"], sizes),
        scores=batch["scores"],
        reference_logps=None if reference_CT is None else pad_by_group(reference_CT.sum(1), sizes),
    )


class PreferenceTrainer(GroupTrainer):
    """Trainer of preference losses; a row is a group, and batch sizes count groups."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data: TrainerData,
        *,
        objective: PreferenceObjective,
        reference_policy: ReferencePolicy | None = None,
        precision: str = "float32",
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        """Set up the trainer.

        Args:
            model: base with adapter.
            args: the engine's training arguments.
            data: ``PreferenceDataset`` rows, and a ``PreferenceCollator``.
            objective: the loss.
            reference_policy: the live reference; None if its log-probabilities are in the rows or not needed.
            precision: of the forward passes outside of training.
            hooks: the adapter's callbacks during training.
        """
        super().__init__(model, args, data, hooks=hooks)
        self.objective = objective
        self.reference_policy = reference_policy
        self.precision = precision
        self.averager = MetricAverager()

    @cached_property
    def head(self) -> nn.Module:
        return output_head(self.accelerator.unwrap_model(self.model))

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
        num_real = len(inputs["row_ids"])
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

    @torch.no_grad()
    def held_out_metrics(self) -> dict[str, float]:
        """Return the metric means over all held-out groups, without dropout, sharded over processes."""
        rows, averager = self.eval_dataset, MetricAverager()
        batch_size = self.args.per_device_train_batch_size
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


class ChosenLogpStop(TrainerCallback):  # type: ignore[misc]
    """Stops training once the held-out chosen log-probability dropped by more than ``max_drop`` per token."""

    def __init__(self, ctx: RunContext[StageSettings], max_drop: float) -> None:
        self.ctx = ctx
        self.max_drop = max_drop

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare with the value before training, which the run has recorded."""
        initial: float = self.ctx.run.record["metrics"][f"{HELD_OUT_CHOSEN_LOGPS}_before"]
        drop = initial - kwargs["metrics"][as_logged(HELD_OUT_CHOSEN_LOGPS)]
        # Also if a signal arrived at this step: the run must not resume after it.
        if drop > self.max_drop and state.global_step < state.max_steps:
            # No checkpoint at this step: a run killed before its end resumes from an earlier one, evaluates
            # the same policy and stops here again.
            control.should_training_stop, control.should_save = True, False
            reason = (
                f"stopped at step {state.global_step}: held-out chosen log-probability dropped by "
                f"{drop:.3f} nats per token, more than dpo.max_chosen_logp_drop ({self.max_drop:g})"
            )
            self.ctx.log(reason)
            self.ctx.run.update(stop_reason=reason)
