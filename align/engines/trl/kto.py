"""KTO on the TRL engine: TRL's KTOTrainer with our token ids, row order and precomputed reference."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import KTOConfig, KTOTrainer

from align.engines.trl.preference import (
    ROUNDING_TOLERANCE,
    RenamePreferenceMetrics,
    completion_logps_by_batch,
    delete_reference_adapter,
    find_row_locations,
    placeholder_rows,
    progress_bars_disabled,
    shared_dataset,
)
from align.preference.losses.unpaired import kto, mismatched_rows, reference_point
from align.preference.rows.dataset import PreferenceGroups
from finetune.data.batches import optimizer_batches
from finetune.distributed.rank import dist_info
from finetune.engines.trl.trainer import TrlTrainerMixin
from finetune.recipe.errors import Problem
from finetune.training.model import preserve_state
from finetune.training.preflight.checks import CheckResult, failed

TENSOR_PREFIXES = ("", "KL_")
"""TRL's tensor prefixes: each row's own completion, and the mismatched one of the KL estimate."""


@dataclass(frozen=True, slots=True)
class HeldOutLabels:
    """Held-out rows with reference log-probabilities of own and mismatched completions, (rows,) each."""

    dataset: Dataset
    desirable: Tensor
    reference_logps: dict[str, Tensor]


class TrlKTOTrainer(TrlTrainerMixin, KTOTrainer, RenamePreferenceMetrics):  # type: ignore[misc]
    """TRL's KTOTrainer with held-out metrics from our loss; a non-finite loss names its rows."""

    def __init__(
        self,
        model: nn.Module,
        args: KTOConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train: PreferenceGroups,
        held_out: PreferenceGroups | None,
        order: list[int],
    ) -> None:
        """Set up TRL's trainer for tokenized rows; the reference is the current model.

        Args:
            model: base with adapter, before its first step.
            args: with ``precompute_ref_log_probs``.
            tokenizer: for padding.
            train: training rows.
            held_out: held-out rows, if any.
            order: of the training rows.
        """
        assert args.precompute_ref_log_probs, "TRL would load a second reference model"
        # TRL tokenizes its dataset in the constructor: it gets a placeholder, ours replaces it below.
        placeholder_dataset = Dataset.from_dict({**placeholder_rows(tokenizer), "label": [True, False]})
        with progress_bars_disabled(), shared_dataset(placeholder_dataset, args) as rows:
            super().__init__(
                model=model,
                args=args,
                train_dataset=rows,
                eval_dataset=None if held_out is None else rows,
                processing_class=tokenizer,
            )
        delete_reference_adapter(model)
        self.groups = train
        # TRL's batches of all ranks together: only rows of one forward pass are paired.
        global_batch_size = args.per_device_train_batch_size * dist_info().world_size
        train_dataset = to_label_dataset(train, order=order, batch_size=global_batch_size)
        reference = self._own_and_mismatched_logps(train_dataset)
        # The columns that TRL reads with `precompute_ref_log_probs`.
        self.train_dataset = train_dataset.add_column("ref_logps", reference[""].tolist()).add_column(
            "ref_KL_logps", reference["KL_"].tolist()
        )
        self.held_out = None if held_out is None else self._held_out_labels(held_out, global_batch_size)
        if self.held_out is not None:
            self.eval_dataset = self.held_out.dataset

    def row_locations(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """Return the locations of a micro-batch's rows."""
        return find_row_locations(self.groups, inputs)

    def held_out_metrics(self) -> dict[str, float]:
        """Return loss, implicit rewards, their margin and the reference point z over all held-out rows.

        z is estimated from all held-out rows, but in training from each micro-batch.
        """
        held_out = self.held_out
        assert held_out is not None
        logps = self._own_and_mismatched_logps(held_out.dataset)
        logratios, mismatched_logratios = (
            logps[prefix] - held_out.reference_logps[prefix] for prefix in TENSOR_PREFIXES
        )
        point = reference_point(mismatched_logratios)
        output = kto(
            logratios,
            held_out.desirable,
            reference_point=point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        chosen, rejected = (
            output.rewards[held_out.desirable].mean(),
            output.rewards[~held_out.desirable].mean(),
        )
        means = {"loss": output.losses.mean(), "rewards/chosen": chosen, "rewards/rejected": rejected}
        return {name: float(value) for name, value in means.items()} | {
            "rewards/margins": float(chosen - rejected),
            "kto/z": float(point),
        }

    def _held_out_labels(self, groups: PreferenceGroups, batch_size: int) -> HeldOutLabels:
        # Sorted by length, so that a forward pass has little padding.
        order = np.argsort(groups.lengths, kind="stable").tolist()
        dataset = to_label_dataset(groups, order=order, batch_size=batch_size)
        desirable = torch.tensor(dataset["label"])
        return HeldOutLabels(dataset, desirable, self._own_and_mismatched_logps(dataset))

    def _own_and_mismatched_logps(self, dataset: Dataset) -> dict[str, Tensor]:
        """Return log-probabilities of each row's own and mismatched completion: (rows,) each."""
        return {
            prefix: torch.cat(completion_logps_by_batch(self, dataset, prefix=prefix))
            for prefix in TENSOR_PREFIXES
        }


def to_label_dataset(groups: PreferenceGroups, *, order: list[int], batch_size: int) -> Dataset:
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
            "KL_completion_ids": [
                completions[mismatched_row] for mismatched_row in mismatched_rows(prompts, batch_size)
            ],
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


@torch.no_grad()
def check_initial_loss(trainer: TrlKTOTrainer, precision: str) -> CheckResult:
    """Check that policy equals reference: each completion's loss is half its weight, s(0) = 1/2."""
    rows = [trainer.train_dataset[index] for index in range(trainer.args.per_device_train_batch_size)]
    cpu_batch: dict[str, Tensor] = trainer.data_collator(rows)
    batch = {name: value.to(trainer.args.device) for name, value in cpu_batch.items()}
    desirable = cpu_batch["label"].numpy()
    weights: tuple[float, float] = (trainer.desirable_weight, trainer.undesirable_weight)
    # z is 0 as well: policy and reference are equal on the mismatched completions too.
    expected = float(np.where(desirable, *weights).mean() / 2)
    with preserve_state(trainer.model), trainer.accelerator.autocast():
        loss = float(trainer.compute_loss(trainer.model, batch))
    detail = f"policy equals reference before step 0: loss {loss:.4f}, expected {expected:.4f}"
    if abs(loss - expected) <= ROUNDING_TOLERANCE[precision]:
        return CheckResult("start", detail)
    problem = Problem(
        "train.engine", f"initial loss {loss:.4f}", f"{expected:.4f}: policy equals reference before step 0"
    )
    return failed("start", problem)
