"""KTO on TRL: its trainer with our rows, our order of them, and the policy's start as reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import KTOConfig, KTOTrainer

from align.preference.losses.unpaired import kto, mismatched, reference_point
from align.preference.rows.dataset import PreferenceGroups
from align.preference.trl_engine import (
    InOurWords,
    logps_of,
    made_quietly,
    own_replies,
    places_by_tokens,
    places_of,
    refuse_not_finite,
    seen_by_all,
    without_copy,
)
from finetune.data.batches import optimizer_batches
from finetune.planning.world import world
from finetune.training.base_trainer import log_held_out

KINDS = ("", "KL_")
"""TRL's tensors of the completions themselves, and of those behind another prompt."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Held-out rows, and what the reference says of their completions and of mismatched ones: (rows,)."""

    columns: Dataset
    good: Tensor
    reference: dict[str, Tensor]


class MeasuredKTOTrainer(KTOTrainer, InOurWords):  # type: ignore[misc]
    """TRL's trainer, with our held-out measures; a NaN names its rows."""

    places: Mapping[tuple[int, ...], str]
    held_out: Judged | None = None

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
        assert self.held_out is not None
        return log_held_out(self, {f"held_out_{key}": value for key, value in self.measure().items()})

    def measure(self) -> dict[str, float]:
        """Return loss, rewards, their margin and the reference point over all held-out rows.

        The loss's reference point is that of all of them, where training's is each forward pass's own.
        """
        rows = self.held_out
        assert rows is not None
        found = _both(self, rows.columns)
        ratios, others = (found[kind] - rows.reference[kind] for kind in KINDS)
        point = reference_point(others)
        judged = kto(
            ratios,
            rows.good,
            reference_point=point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        chosen, rejected = judged.rewards[rows.good].mean(), judged.rewards[~rows.good].mean()
        found_all = {"loss": judged.losses.mean(), "chosen_reward": chosen, "rejected_reward": rejected}
        return {name: float(value) for name, value in found_all.items()} | {
            "margin": float(chosen - rejected),
            "kl": float(point),
        }


def label_columns(groups: PreferenceGroups, *, order: list[int], size: int) -> Dataset:
    """Return rows as TRL's ``DataCollatorForUnpairedPreference`` takes them, in the order of training.

    Args:
        groups: one completion each, of score 1 (good) or 0 (bad).
        order: the rows' numbers.
        size: rows of all processes' forward passes, which lend each other completions (``mismatched``).
    """
    rows = [groups[index] for index in order]
    assert all(len(row.completion_ids) == 1 for row in rows), "single completions"
    prompts = [tuple(row.prompt_ids.tolist()) for row in rows]
    completions = [row.completion_ids[0].tolist() for row in rows]
    return Dataset.from_dict(
        {
            "prompt_ids": prompts,
            "completion_ids": completions,
            "KL_completion_ids": [completions[other] for other in mismatched(prompts, size)],
            "label": [bool(row.scores[0]) for row in rows],
        }
    )


def training_order(
    groups: PreferenceGroups, *, batch_size: int, seed: int, group_by_length: bool
) -> list[int]:
    """Return the rows of every epoch: shuffled once, because TRL pairs neighbours and keeps their order."""
    lengths = groups.lengths.tolist()
    batches = optimizer_batches(lengths, batch_size, seed=seed, epoch=0, group_by_length=group_by_length)
    return [row for batch in batches for row in batch]


def trl_kto_trainer(
    model: nn.Module,
    args: KTOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: PreferenceGroups,
    held_out: PreferenceGroups | None,
    order: list[int],
) -> MeasuredKTOTrainer:
    """Return TRL's KTOTrainer on rows that are tokenised already; the reference is the model as it is now.

    Args:
        model: base with adapter, before its first step.
        args: with ``precompute_ref_log_probs``.
        tokenizer: for padding.
        train: what is learnt.
        held_out: what is measured, if anything.
        order: of the training rows.
    """
    assert args.precompute_ref_log_probs, "or TRL would keep a reference of its own"
    replies = own_replies(tokenizer)
    own = Dataset.from_dict({**replies, "label": [True, False]})
    with made_quietly(), seen_by_all(own, args) as rows:
        trainer = MeasuredKTOTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=None if held_out is None else rows,
            processing_class=tokenizer,
        )
    without_copy(model)
    size = args.per_device_train_batch_size * world().size
    columns = label_columns(train, order=order, size=size)
    reference = _both(trainer, columns)
    trainer.train_dataset = columns.add_column("ref_logps", reference[""].tolist()).add_column(
        "ref_KL_logps", reference["KL_"].tolist()
    )
    trainer.places = places_of(train)
    if held_out is not None:
        measured = label_columns(
            held_out, order=np.argsort(held_out.lengths, kind="stable").tolist(), size=size
        )
        good = torch.tensor(measured["label"])
        trainer.held_out = Judged(measured, good, _both(trainer, measured))
        trainer.eval_dataset = measured
    return trainer


def _both(trainer: MeasuredKTOTrainer, columns: Dataset) -> dict[str, Tensor]:
    """Return log-probabilities of the completions, and of those behind another prompt: (rows,) each."""
    return {kind: torch.cat(logps_of(trainer, columns, kind=kind)) for kind in KINDS}
