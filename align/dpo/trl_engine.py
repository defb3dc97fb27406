"""DPO on the TRL engine: TRL's DPOTrainer with our token ids and precomputed reference log-probabilities."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from align.dpo.trl_losses import NATIVE
from align.preference.losses import metrics
from align.preference.losses.inputs import LossOutput, Pairs
from align.preference.rows.dataset import PreferenceGroups
from align.preference.trl_engine import (
    InOurWords,
    logps_of,
    made_quietly,
    own_replies,
    pair_columns,
    places_by_tokens,
    places_of,
    refuse_not_finite,
    seen_by_all,
    without_copy,
)
from finetune.recipe.errors import Problem
from finetune.training.base_trainer import log_held_out
from finetune.training.preflight.ticks import Tick, failed
from finetune.training.preflight.untouched import untouched

SIDES = ("chosen_ids", "rejected_ids")
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
"""TRL's columns of a pair's token ids and of its reference log-probabilities."""
START = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""Relative rounding tolerance for the initial loss."""


class MeasuredDPOTrainer(DPOTrainer, InOurWords):  # type: ignore[misc]
    """TRL's DPOTrainer with held-out metrics from our loss; a non-finite loss names its rows."""

    places: Mapping[tuple[int, ...], str]
    loss: Callable[[Pairs], LossOutput]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass; stop the run if the loss is not finite.

        Raises:
            NotFiniteError: NaN or infinite loss; the message names the rows.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        refuse_not_finite(self, loss, places_by_tokens(self.places, ids, mask))
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out metrics."""
        found = self.measure(self.eval_dataset)
        return log_held_out(self, {f"held_out_{key}": value for key, value in found.items()})

    def measure(self, columns: Dataset) -> dict[str, float]:
        """Return the metric means over all pairs of ``dataset``, with the native engine's names."""
        chosen, rejected = _by_side(logps_of(self, columns))
        lengths = [torch.tensor([len(ids) for ids in columns[side]]) for side in SIDES]
        pairs = Pairs(chosen, rejected, *lengths, *(torch.tensor(columns[name]) for name in REFERENCES))
        found = self.loss(pairs)
        sides = (found.chosen_rewards, found.rejected_rewards)
        means = {
            "loss": found.losses,
            "margin": metrics.margins(*sides),
            "accuracy": metrics.accuracies(*sides),
            "chosen_logps": pairs.chosen_means,
            "rejected_logps": pairs.rejected_means,
            "chosen_drift": pairs.chosen_ratios / lengths[0],
            "rejected_drift": pairs.rejected_ratios / lengths[1],
        }
        ratio = metrics.length_ratio(lengths[0], lengths[1])
        return {name: float(value.mean()) for name, value in means.items()} | {"length_ratio": float(ratio)}


def trl_dpo_trainer(
    model: nn.Module,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: PreferenceGroups,
    held_out: PreferenceGroups | None,
    loss: Callable[[Pairs], LossOutput],
) -> MeasuredDPOTrainer:
    """Return TRL's DPOTrainer on tokenized pairs; the reference is the current model.

    Args:
        model: base with adapter, before its first step.
        args: with ``trl_loss`` and ``precompute_ref_log_probs``.
        tokenizer: for padding.
        train: training pairs.
        held_out: held-out pairs, if any.
        loss: our loss, for the held-out metrics.
    """
    assert args.precompute_ref_log_probs, "TRL would load a second reference model"
    replies = own_replies(tokenizer)
    [chosen, rejected] = replies["completion"]
    # TRL tokenizes its dataset in the constructor: it gets a placeholder, ours replaces it below.
    own = Dataset.from_dict({"prompt": replies["prompt"][:1], "chosen": [chosen], "rejected": [rejected]})
    with made_quietly(), seen_by_all(own, args) as rows:
        trainer = MeasuredDPOTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=None if held_out is None else rows,
            processing_class=tokenizer,
        )
    without_copy(model)
    trainer.train_dataset, trainer.places, trainer.loss = _referred(trainer, train), places_of(train), loss
    if held_out is not None:
        trainer.eval_dataset = _referred(trainer, held_out)
    return trainer


@torch.no_grad()
def start_tick(trainer: MeasuredDPOTrainer, precision: str) -> Tick:
    """Check that policy equals reference: TRL's initial loss is ours at log-ratios of 0."""
    count = min(len(trainer.train_dataset), trainer.args.per_device_train_batch_size)
    rows = [trainer.train_dataset[index] for index in range(count)]
    batch = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(rows).items()}
    # Log-ratios of 0: what our loss is if policy equals reference.
    zeros, ones = torch.zeros(count), torch.ones(count)
    expected = float(trainer.loss(Pairs(zeros, zeros, ones, ones, zeros, zeros)).losses.mean())
    with untouched(trainer.model), trainer.accelerator.autocast():
        found = float(trainer.compute_loss(trainer.model, batch))
    if abs(found - expected) <= START[precision] * max(1.0, expected):
        detail = f"policy equals reference before step 0: loss {found:.4f}, expected {expected:.4f}"
        return Tick("start", detail)
    told = f"{expected:.4f}: policy equals reference before step 0"
    return failed("start", Problem("train.engine", f"initial loss {found:.4f}", told, NATIVE))


def _referred(trainer: MeasuredDPOTrainer, groups: PreferenceGroups) -> Dataset:
    """Return pairs with their log-probabilities under the current policy as the reference."""
    columns = pair_columns(groups)
    for name, values in zip(REFERENCES, _by_side(logps_of(trainer, columns)), strict=True):
        columns = columns.add_column(name, values.tolist())
    return columns


def _by_side(passes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return chosen and rejected values, (pairs,) each, of batches that hold the chosen completions first."""
    sides = [values.chunk(2) for values in passes]
    return torch.cat([side[0] for side in sides]), torch.cat([side[1] for side in sides])
