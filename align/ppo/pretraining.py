"""PPO-ptx: beside its rewards the policy goes on learning what it had learnt (InstructGPT, equation 2)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from align.ppo.experience import rows_of_rollout
from align.preference.attention import unwrapped
from finetune.data.collate import PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.training.completion import completion_loss_sum
from finetune.training.head import output_head
from finetune.training.loss import loss_positions

ROWS, LABELS = "pretraining", "pretraining_labels"


@dataclass(frozen=True)
class Pretraining:
    """Rows that are learnt beside the rewards.

    Attributes:
        rows: conversations with the labels of stage sft.
        collate: rows to tensors.
        batch_size: rows of an optimizer step.
        weight: gamma, what the mean loss over their labels counts.
        seed: of their order.
    """

    rows: TokenizedRows
    collate: PaddedCollator
    batch_size: int
    weight: float
    seed: int

    def add_to(self, batches: list[dict[str, Any]], *, step: int) -> None:
        """Deal the rows of an optimizer step out to its forward passes."""
        numbers = rows_of_rollout(len(self.rows), self.batch_size, step, seed=self.seed)
        hands = [numbers[start :: len(batches)] for start in range(len(batches))]
        dealt = [self.collate([self.rows[number] for number in hand]) if hand else None for hand in hands]
        labels = sum(len(loss_positions(rows["labels"])[1]) for rows in dealt if rows is not None)
        for batch, rows in zip(batches, dealt, strict=True):
            if rows is not None:
                batch[ROWS], batch[LABELS] = dict(rows), labels

    def loss(self, policy: nn.Module, inputs: dict[str, Any]) -> Tensor | float:
        """Return a forward pass's share of gamma times the mean loss over the step's labels."""
        if ROWS not in inputs:
            return 0.0
        head = output_head(unwrapped(policy))
        loss: Tensor = self.weight * completion_loss_sum(policy, head, inputs[ROWS]) / inputs[LABELS]
        return loss
