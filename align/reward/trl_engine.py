"""TRL engine of stage `reward`: TRL's RewardTrainer on our tokenized pairs."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from align.preference.losses import metrics
from align.preference.losses.reward import bradley_terry
from align.preference.rows.dataset import PreferenceGroups
from align.preference.trl_engine import places_by_tokens, places_of, refuse_not_finite
from finetune.training.arguments import TrlStage
from finetune.training.base_trainer import log_held_out
from finetune.training.preflight.untouched import untouched


def reward_stage(*, centring: float) -> TrlStage:
    """Return the arguments of RewardConfig; the coefficient is that of ``bradley_terry``, 0 for off."""
    return TrlStage("RewardConfig", {"center_rewards_coefficient": centring or None})


class MeasuredRewardTrainer(RewardTrainer):  # type: ignore[misc]
    """TRL's RewardTrainer with our held-out metrics; a NaN loss reports its rows."""

    places: Mapping[tuple[int, ...], str]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass; stop the run if the loss is NaN or infinite.

        Raises:
            NotFiniteError: NaN or infinite loss; the message names the rows.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        refuse_not_finite(self, loss, places_by_tokens(self.places, ids, mask))
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out metrics."""
        return log_held_out(self, {f"held_out_{key}": value for key, value in self.measure().items()})

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return loss, margin and accuracy over all held-out pairs; the loss has no data margins."""
        columns, size = self.eval_dataset, self.args.per_device_train_batch_size
        passes = []
        with untouched(self.model), self.accelerator.autocast():
            for start in range(0, len(columns), size):
                rows = [columns[index] for index in range(start, min(start + size, len(columns)))]
                batch = {key: value.to(self.args.device) for key, value in self.data_collator(rows).items()}
                names = ("input_ids", "attention_mask")
                scores = self.model(**{name: batch[name] for name in names}, use_cache=False).logits
                passes.append(scores.squeeze(-1).float().cpu().chunk(2))
        chosen, rejected = (torch.cat([sides[side] for sides in passes]) for side in (0, 1))
        return {
            "loss": float(bradley_terry(chosen, rejected).mean()),
            "margin": float(metrics.margins(chosen, rejected).mean()),
            "accuracy": float(metrics.accuracies(chosen, rejected).mean()),
        }


def score_columns(groups: PreferenceGroups, *, margins: list[float] | None = None) -> Dataset:
    """Convert pairs to TRL's RewardTrainer dataset: prompt plus completion, chosen and rejected.

    Args:
        groups: groups of two completions, the better one first.
        margins: target margin of each pair.
    """
    rows = [groups[index] for index in range(len(groups))]
    assert all(len(row.completion_ids) == 2 for row in rows), "pairs"
    whole = [
        [[*row.prompt_ids.tolist(), *row.completion_ids[side].tolist()] for row in rows] for side in (0, 1)
    ]
    columns: dict[str, list[Any]] = {"chosen_ids": whole[0], "rejected_ids": whole[1]}
    return Dataset.from_dict(columns | ({} if margins is None else {"margin": margins}))


def trl_reward_trainer(
    model: nn.Module,
    args: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: PreferenceGroups,
    held_out: PreferenceGroups | None,
    pad_id: int,
    margins: list[float] | None = None,
) -> MeasuredRewardTrainer:
    """Return TRL's RewardTrainer on tokenized pairs.

    Args:
        model: base with adapter and a single score head.
        args: from ``reward_config_spec``.
        tokenizer: the base's tokenizer; not modified.
        train: training pairs.
        held_out: held-out pairs, if any.
        pad_id: a token that never ends a text.
        margins: target margin of each training pair.
    """
    # TRL pads with the tokenizer's pad token, and transformers reads the score at the last other token. If
    # the pad token is EOS, as in many chat models, that is one token too early.
    padding = deepcopy(tokenizer)
    padding.pad_token = padding.convert_ids_to_tokens(pad_id)
    trainer = MeasuredRewardTrainer(
        model=model,
        args=args,
        train_dataset=score_columns(train, margins=margins),
        eval_dataset=None if held_out is None else score_columns(held_out),
        processing_class=padding,
    )
    trainer.places = places_of(train)
    return trainer
