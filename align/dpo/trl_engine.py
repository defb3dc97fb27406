"""DPO on TRL: its trainer with our tokens, our loss in its name, and the policy's start as reference."""

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
"""TRL's names of a pair's tokens, and of what the reference says of them."""
START = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""How far the first loss may be from its value at the reference, relative, from rounding alone."""


class MeasuredDPOTrainer(DPOTrainer, InOurWords):  # type: ignore[misc]
    """TRL's trainer, with our held-out measures by our own loss; a NaN names its rows."""

    places: Mapping[tuple[int, ...], str]
    loss: Callable[[Pairs], LossOutput]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass; stop the run when its loss is no number.

        Raises:
            NotFiniteError: NaN or infinite loss; the message names the rows.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        refuse_not_finite(self, loss, places_by_tokens(self.places, ids, mask))
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out measures."""
        found = self.measure(self.eval_dataset)
        return log_held_out(self, {f"held_out_{key}": value for key, value in found.items()})

    def measure(self, columns: Dataset) -> dict[str, float]:
        """Return the means over all pairs of ``columns``, in the native engine's words."""
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
    """Return TRL's DPOTrainer on pairs that are tokenised already; the reference is the model as it is now.

    Args:
        model: base with adapter, before its first step.
        args: with ``trl_loss`` and ``precompute_ref_log_probs``.
        tokenizer: for padding.
        train: what is learnt; pairs.
        held_out: what is measured, if anything; pairs.
        loss: ours, which measures the held-out pairs.
    """
    assert args.precompute_ref_log_probs, "or TRL would keep a reference of its own"
    replies = own_replies(tokenizer)
    [chosen, rejected] = replies["completion"]
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
    """Check that the policy begins as its own reference: TRL's first loss is ours of ratios that are 0."""
    count = min(len(trainer.train_dataset), trainer.args.per_device_train_batch_size)
    rows = [trainer.train_dataset[index] for index in range(count)]
    batch = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(rows).items()}
    zeros, ones = torch.zeros(count), torch.ones(count)
    expected = float(trainer.loss(Pairs(zeros, zeros, ones, ones, zeros, zeros)).losses.mean())
    with untouched(trainer.model), trainer.accelerator.autocast():
        found = float(trainer.compute_loss(trainer.model, batch))
    if abs(found - expected) <= START[precision] * max(1.0, expected):
        detail = f"the policy begins as the reference: first loss {found:.4f}, {expected:.4f} expected"
        return Tick("start", detail)
    told = f"{expected:.4f}: the policy is the reference"
    return failed("start", Problem("train.engine", f"first loss {found:.4f}", told, NATIVE))


def _referred(trainer: MeasuredDPOTrainer, groups: PreferenceGroups) -> Dataset:
    """Return pairs with what the policy, as it is now, says of them."""
    columns = pair_columns(groups)
    for name, values in zip(REFERENCES, _by_side(logps_of(trainer, columns)), strict=True):
        columns = columns.add_column(name, values.tolist())
    return columns


def _by_side(passes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return chosen and rejected completions' values, (pairs,) each, of passes that hold the chosen first."""
    sides = [values.chunk(2) for values in passes]
    return torch.cat([side[0] for side in sides]), torch.cat([side[1] for side in sides])
