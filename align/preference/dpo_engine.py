"""DPO on TRL: its trainer with our tokens, our loss in its name, and the policy's start as reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from align.preference import metrics
from align.preference.dataset import PreferenceGroups
from align.preference.inputs import LossOutput, Pairs
from align.preference.losses import Setting
from align.preference.trl_engine import (
    InOurWords,
    logps_of,
    made_quietly,
    own_replies,
    pair_columns,
    places_by_tokens,
    places_of,
    without_copy,
)
from finetune.recipe.errors import Problem, UserError, one_of
from finetune.training.arguments import TrlStage
from finetune.training.base_trainer import log_held_out
from finetune.training.stops import NotFiniteError

SAME = {
    "dpo": "sigmoid",
    "robust": "robust",
    "ipo": "ipo",
    "hinge": "hinge",
    "exo": "exo_pair",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}
"""Our losses: TRL's. Its `sigmoid` has no label smoothing, so there is no cDPO; its likelihood is the mean
over all tokens of a pass and not over pairs, so there is no RPO."""
NATIVE = "train.engine=native"


def dpo_stage(loss: str, settings: Mapping[str, Setting]) -> TrlStage:
    """Return TRL's arguments for a loss of the catalogue.

    Args:
        loss: its name.
        settings: all of its settings.

    Raises:
        UserError: TRL has no such loss.
    """
    if loss not in SAME:
        expected = f"with train.engine 'trl': {one_of(SAME)}"
        raise UserError(Problem("align.loss", f"'{loss}'", expected, NATIVE))
    if settings.get("over_tokens") == "sum":
        found = f"'{loss}' summed over tokens, as the paper prints it"
        expected = "with train.engine 'trl': the mean over tokens"
        repair = (
            f"align.loss={{name: {loss}, over_tokens: mean, beta: ...}}, where beta is per token; or {NATIVE}"
        )
        raise UserError(Problem("align.loss", found, expected, repair))
    own = {key: settings[key] for key in ("beta", "label_smoothing") if key in settings}
    return TrlStage("DPOConfig", {"loss_type": [SAME[loss]], "loss_weights": None, **own})


def refuse_lists(groups: PreferenceGroups, *, where: str) -> None:
    """Refuse groups that are no pairs.

    Raises:
        UserError: a group has more than two completions; the first such is named.
    """
    longer = [index for index, count in enumerate(groups.completions) if count != 2]
    if longer:
        first = groups[longer[0]]
        found = (
            f"{len(longer)} prompts with more than two completions (first: {first.place}, "
            f"{len(first.completion_ids)} completions)"
        )
        raise UserError(Problem(where, found, "pairs, with train.engine 'trl'", NATIVE))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out pairs, and what the reference says of them: chosen and rejected, (pairs,) each."""

    columns: Dataset
    reference: tuple[Tensor, Tensor]


class MeasuredDPOTrainer(DPOTrainer, InOurWords):  # type: ignore[misc]
    """TRL's trainer, with our held-out measures by our own loss; a NaN names its rows."""

    places: Mapping[tuple[int, ...], str]
    loss: Callable[[Pairs], LossOutput]
    held_out: HeldOut | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass; stop the run when its loss is no number.

        Raises:
            NotFiniteError: NaN or infinite loss; the message names the rows.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            places = ", ".join(dict.fromkeys(places_by_tokens(self.places, ids, mask)))
            raise NotFiniteError(f"loss is {loss.item()} at step {self.state.global_step + 1}, on {places}")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out measures."""
        return log_held_out(self, {f"held_out_{key}": value for key, value in self.measure().items()})

    def measure(self) -> dict[str, float]:
        """Return the means over all held-out pairs, in the native engine's words."""
        rows = self.held_out
        assert rows is not None
        chosen, rejected = _by_side(logps_of(self, rows.columns))
        lengths = [
            torch.tensor([len(ids) for ids in rows.columns[side]]) for side in ("chosen_ids", "rejected_ids")
        ]
        pairs = Pairs(chosen, rejected, lengths[0], lengths[1], *rows.reference)
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
        args: of ``dpo_stage``, with ``precompute_ref_log_probs``.
        tokenizer: for padding.
        train: what is learnt; pairs.
        held_out: what is measured, if anything; pairs.
        loss: ours, which measures the held-out pairs.
    """
    assert args.precompute_ref_log_probs, "or TRL would keep a reference of its own"
    replies = own_replies(tokenizer)
    [chosen, rejected] = replies["completion"]
    own = Dataset.from_dict({"prompt": replies["prompt"][:1], "chosen": [chosen], "rejected": [rejected]})
    with made_quietly():
        trainer = MeasuredDPOTrainer(
            model=model,
            args=args,
            train_dataset=own,
            eval_dataset=None if held_out is None else own,
            processing_class=tokenizer,
        )
    without_copy(model)
    columns = pair_columns(train)
    reference = _by_side(logps_of(trainer, columns))
    for name, values in zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True):
        columns = columns.add_column(name, values.tolist())
    trainer.train_dataset, trainer.places, trainer.loss = columns, places_of(train), loss
    if held_out is not None:
        measured = pair_columns(held_out)
        trainer.held_out = HeldOut(measured, _by_side(logps_of(trainer, measured)))
        trainer.eval_dataset = measured
    return trainer


def _by_side(passes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return chosen and rejected completions' values, (pairs,) each, of passes that hold the chosen first."""
    sides = [values.chunk(2) for values in passes]
    return torch.cat([side[0] for side in sides]), torch.cat([side[1] for side in sides])
