"""KTO on the TRL engine: TRL's KTOTrainer with our token ids, row order and precomputed reference."""

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
"""TRL's tensor prefixes: each row's own completion, and the mismatched one of the KL estimate."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Held-out rows with reference log-probabilities of own and mismatched completions, (rows,) each."""

    columns: Dataset
    good: Tensor
    reference: dict[str, Tensor]


class MeasuredKTOTrainer(KTOTrainer, InOurWords):  # type: ignore[misc]
    """TRL's KTOTrainer with held-out metrics from our loss; a non-finite loss names its rows."""

    places: Mapping[tuple[int, ...], str]
    held_out: Judged | None = None

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
        assert self.held_out is not None
        return log_held_out(self, {f"held_out_{key}": value for key, value in self.measure().items()})

    def measure(self) -> dict[str, float]:
        """Return loss, implicit rewards, their margin and the reference point z over all held-out rows.

        z is estimated from all held-out rows, but in training from each micro-batch.
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
    """Return rows in the columns of TRL's ``DataCollatorForUnpairedPreference``, in training order.

    Args:
        groups: one completion each, with score 1 (good) or 0 (bad).
        order: row ids, in training order.
        batch_size: rows of a forward pass over all processes, which swap completions (``mismatched_rows``).
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
    """Return the row order of every epoch, shuffled once."""
    # KTO pairs neighboring rows for its KL estimate, so TRL keeps their order in every epoch.
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
    """Return TRL's KTOTrainer on tokenized rows; the reference is the current model.

    Args:
        model: base with adapter, before its first step.
        args: with ``precompute_ref_log_probs``.
        tokenizer: for padding.
        train: training rows.
        held_out: held-out rows, if any.
        order: of the training rows.
    """
    assert args.precompute_ref_log_probs, "TRL would load a second reference model"
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
    # TRL's batches of all ranks together: only rows of one forward pass are paired.
    size = args.per_device_train_batch_size * world().size
    columns = label_columns(train, order=order, size=size)
    reference = _both(trainer, columns)
    # The columns that TRL reads with `precompute_ref_log_probs`.
    trainer.train_dataset = columns.add_column("ref_logps", reference[""].tolist()).add_column(
        "ref_KL_logps", reference["KL_"].tolist()
    )
    trainer.places = places_of(train)
    if held_out is not None:
        measured = label_columns(
            # Sorted by length, so that a forward pass has little padding.
            held_out,
            order=np.argsort(held_out.lengths, kind="stable").tolist(),
            size=size,
        )
        good = torch.tensor(measured["label"])
        trainer.held_out = Judged(measured, good, _both(trainer, measured))
        trainer.eval_dataset = measured
    return trainer


def _both(trainer: MeasuredKTOTrainer, columns: Dataset) -> dict[str, Tensor]:
    """Return log-probabilities of each row's own and mismatched completion: (rows,) each."""
    return {kind: torch.cat(logps_of(trainer, columns, kind=kind)) for kind in KINDS}
