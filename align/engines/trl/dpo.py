"""DPO on the TRL engine: TRL's DPOTrainer with our token ids and precomputed reference log-probabilities."""

from collections.abc import Callable, Mapping

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from align.dpo.settings import NATIVE_ENGINE_REPAIR
from align.engines.trl.preference import (
    ROUNDING_TOLERANCE,
    RenamePreferenceMetrics,
    completion_logps_by_batch,
    delete_reference_adapter,
    find_row_locations,
    placeholder_rows,
    progress_bars_disabled,
    shared_dataset,
    to_pair_dataset,
)
from align.preference.losses import metrics
from align.preference.losses.inputs import LossOutput, Pairs
from align.preference.rows.dataset import PreferenceGroups
from finetune.engines.trl.trainer import TrlTrainerMixin
from finetune.recipe.errors import Problem
from finetune.training.model import preserve_state
from finetune.training.preflight.checks import CheckResult, failed

COMPLETION_COLUMNS = ("chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""TRL's columns of a pair's token ids and of its reference log-probabilities."""


class TrlDPOTrainer(TrlTrainerMixin, DPOTrainer, RenamePreferenceMetrics):  # type: ignore[misc]
    """TRL's DPOTrainer with held-out metrics from our loss; a non-finite loss names its rows."""

    def __init__(
        self,
        model: nn.Module,
        args: DPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train: PreferenceGroups,
        held_out: PreferenceGroups | None,
        loss: Callable[[Pairs], LossOutput],
    ) -> None:
        """Set up TRL's trainer for tokenized pairs; the reference is the current model.

        Args:
            model: base with adapter, before its first step.
            args: with ``trl_loss_arguments`` and ``precompute_ref_log_probs``.
            tokenizer: for padding.
            train: training pairs.
            held_out: held-out pairs, if any.
            loss: our loss, for the held-out metrics.
        """
        assert args.precompute_ref_log_probs, "TRL would load a second reference model"
        placeholder = placeholder_rows(tokenizer)
        [chosen, rejected] = placeholder["completion"]
        # TRL tokenizes its dataset in the constructor: it gets a placeholder, ours replaces it below.
        placeholder_dataset = Dataset.from_dict(
            {"prompt": placeholder["prompt"][:1], "chosen": [chosen], "rejected": [rejected]}
        )
        with progress_bars_disabled(), shared_dataset(placeholder_dataset, args) as rows:
            super().__init__(
                model=model,
                args=args,
                train_dataset=rows,
                eval_dataset=None if held_out is None else rows,
                processing_class=tokenizer,
            )
        delete_reference_adapter(model)
        self.groups, self.loss = train, loss
        self.train_dataset = self._with_reference_logps(train)
        if held_out is not None:
            self.eval_dataset = self._with_reference_logps(held_out)

    def row_locations(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """Return the locations of a micro-batch's rows."""
        return find_row_locations(self.groups, inputs)

    def held_out_metrics(self) -> dict[str, float]:
        """Return the metric means over all held-out pairs, with the native engine's names."""
        dataset = self.eval_dataset
        chosen, rejected = _split_chosen_rejected(completion_logps_by_batch(self, dataset))
        lengths = [torch.tensor([len(ids) for ids in dataset[side]]) for side in COMPLETION_COLUMNS]
        pairs = Pairs(
            chosen, rejected, *lengths, *(torch.tensor(dataset[name]) for name in REFERENCE_COLUMNS)
        )
        # Our loss on TRL's log-probabilities: both engines report the same metrics.
        output = self.loss(pairs)
        rewards = (output.chosen_rewards, output.rejected_rewards)
        pair_metrics = {
            "loss": output.losses,
            "rewards/margins": metrics.margins(*rewards),
            "rewards/accuracies": metrics.accuracies(*rewards),
            "logps/chosen": pairs.chosen_mean_logps,
            "logps/rejected": pairs.rejected_mean_logps,
            # Per token, as in `preference_metrics`.
            "logratios/chosen": pairs.chosen_logratios / lengths[0],
            "logratios/rejected": pairs.rejected_logratios / lengths[1],
        }
        ratio = metrics.length_ratio(lengths[0], lengths[1])
        return {name: float(value.mean()) for name, value in pair_metrics.items()} | {
            "data/length_ratio": float(ratio)
        }

    def _with_reference_logps(self, groups: PreferenceGroups) -> Dataset:
        """Return pairs with their log-probabilities under the current policy as the reference."""
        dataset = to_pair_dataset(groups)
        logps = _split_chosen_rejected(completion_logps_by_batch(self, dataset))
        for name, values in zip(REFERENCE_COLUMNS, logps, strict=True):
            dataset = dataset.add_column(name, values.tolist())
        return dataset


@torch.no_grad()
def check_initial_loss(trainer: TrlDPOTrainer, precision: str) -> CheckResult:
    """Check that policy equals reference: TRL's initial loss is ours at log-ratios of 0."""
    count = min(len(trainer.train_dataset), trainer.args.per_device_train_batch_size)
    rows = [trainer.train_dataset[index] for index in range(count)]
    batch = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(rows).items()}
    # Log-ratios of 0: what our loss is if policy equals reference.
    zeros, ones = torch.zeros(count), torch.ones(count)
    expected = float(trainer.loss(Pairs(zeros, zeros, ones, ones, zeros, zeros)).losses.mean())
    with preserve_state(trainer.model), trainer.accelerator.autocast():
        loss = float(trainer.compute_loss(trainer.model, batch))
    if abs(loss - expected) <= ROUNDING_TOLERANCE[precision] * max(1.0, expected):
        detail = f"policy equals reference before step 0: loss {loss:.4f}, expected {expected:.4f}"
        return CheckResult("start", detail)
    expectation = f"{expected:.4f}: policy equals reference before step 0"
    return failed(
        "start", Problem("train.engine", f"initial loss {loss:.4f}", expectation, NATIVE_ENGINE_REPAIR)
    )


def _split_chosen_rejected(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return chosen and rejected values, (pairs,) each, of batches that hold the chosen completions first."""
    sides = [values.chunk(2) for values in batches]
    return torch.cat([side[0] for side in sides]), torch.cat([side[1] for side in sides])
