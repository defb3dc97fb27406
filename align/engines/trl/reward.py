"""TRL engine of stage `reward`: TRL's RewardTrainer on our tokenized pairs."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from align.engines.trl.configs import REWARD_CONFIG
from align.engines.trl.preference import RenamePreferenceMetrics, find_row_locations
from align.preference.losses import metrics
from align.preference.losses.reward import bradley_terry
from align.preference.rows.dataset import PreferenceGroups
from finetune.engines.trl.trainer import TrlTrainerMixin
from finetune.training.arguments import TrlConfigSpec
from finetune.training.model import preserve_state


def reward_config(*, center_rewards_coefficient: float) -> TrlConfigSpec:
    """Return the arguments of RewardConfig; the coefficient is that of ``bradley_terry``, 0 for off."""
    # None and not 0: TRL adds the term unless it is None.
    return REWARD_CONFIG.with_arguments({"center_rewards_coefficient": center_rewards_coefficient or None})


class TrlRewardTrainer(TrlTrainerMixin, RewardTrainer, RenamePreferenceMetrics):  # type: ignore[misc]
    """TRL's RewardTrainer on tokenized pairs, with our held-out metrics; a NaN loss names its rows."""

    def __init__(
        self,
        model: nn.Module,
        args: RewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train: PreferenceGroups,
        held_out: PreferenceGroups | None,
        pad_id: int,
        margins: list[float] | None = None,
    ) -> None:
        """Set up TRL's trainer.

        Args:
            model: base with adapter and a single score head.
            args: from ``reward_config``.
            tokenizer: the base's tokenizer; not modified.
            train: training pairs.
            held_out: held-out pairs, if any.
            pad_id: a token that never ends a text.
            margins: target margin of each training pair.
        """
        # TRL pads with the tokenizer's pad token, and transformers reads the score at the last other token.
        # If the pad token is EOS, as in many chat models, that is one token too early.
        pad_tokenizer = deepcopy(tokenizer)
        pad_tokenizer.pad_token = pad_tokenizer.convert_ids_to_tokens(pad_id)
        super().__init__(
            model=model,
            args=args,
            train_dataset=to_reward_dataset(train, margins=margins),
            eval_dataset=None if held_out is None else to_reward_dataset(held_out),
            processing_class=pad_tokenizer,
        )
        self.groups = train

    def row_locations(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """Return the locations of a micro-batch's rows."""
        return find_row_locations(self.groups, inputs)

    @torch.no_grad()
    def held_out_metrics(self) -> dict[str, float]:
        """Return loss, margin and accuracy over all held-out pairs; the loss has no data margins."""
        pairs, batch_size = self.eval_dataset, self.args.per_device_train_batch_size
        score_chunks = []
        with preserve_state(self.model), self.accelerator.autocast():
            for start in range(0, len(pairs), batch_size):
                rows = [pairs[index] for index in range(start, min(start + batch_size, len(pairs)))]
                batch = {key: value.to(self.args.device) for key, value in self.data_collator(rows).items()}
                input_names = ("input_ids", "attention_mask")
                scores = self.model(**{name: batch[name] for name in input_names}, use_cache=False).logits
                # TRL's collator puts the chosen rows before the rejected ones.
                score_chunks.append(scores.squeeze(-1).float().cpu().chunk(2))
        chosen, rejected = (torch.cat([chunk[side] for chunk in score_chunks]) for side in (0, 1))
        return {
            "loss": float(bradley_terry(chosen, rejected).mean()),
            "rewards/margins": float(metrics.margins(chosen, rejected).mean()),
            "rewards/accuracies": float(metrics.accuracies(chosen, rejected).mean()),
        }


def scaled_margins(groups: PreferenceGroups, scale: float) -> list[float]:
    """Return each pair's target margin, as ``pairwise_margins`` does: 0 where missing, none negative."""
    margins: list[float] = (scale * np.nan_to_num(groups.margins)).clip(min=0).tolist()
    return margins


def to_reward_dataset(groups: PreferenceGroups, *, margins: list[float] | None = None) -> Dataset:
    """Convert pairs to TRL's RewardTrainer dataset: prompt plus completion, chosen and rejected.

    Args:
        groups: groups of two completions, the better one first.
        margins: target margin of each pair.
    """
    rows = list(groups)
    assert all(len(row.completion_ids) == 2 for row in rows), "pairs"
    sequences = [
        [[*row.prompt_ids.tolist(), *row.completion_ids[side].tolist()] for row in rows] for side in (0, 1)
    ]
    columns: dict[str, list[Any]] = {"chosen_ids": sequences[0], "rejected_ids": sequences[1]}
    return Dataset.from_dict(columns | ({} if margins is None else {"margin": margins}))
