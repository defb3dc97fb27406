"""PPO-ptx: beside its rewards the policy goes on learning what it had learnt (InstructGPT, equation 2)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from align.ppo.experience import rows_of_rollout
from finetune.data.collate import PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.planning.world import ALONE, World
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

    def add_to(self, batches: list[dict[str, Any]], *, step: int, world: World = ALONE) -> None:
        """Deal the rows of an optimizer step out to its forward passes; ``batches`` are this process's."""
        numbers = rows_of_rollout(len(self.rows), self.batch_size, step, seed=self.seed)
        hands = [numbers[start :: len(batches) * world.size] for start in range(len(batches) * world.size)]
        dealt = [self.collate([self.rows[number] for number in hand]) if hand else None for hand in hands]
        labels = sum(len(loss_positions(rows["labels"])[1]) for rows in dealt if rows is not None)
        for batch, rows in zip(batches, dealt[world.rank :: world.size], strict=True):
            if rows is not None:
                batch[ROWS], batch[LABELS] = dict(rows), labels

    def loss(self, unlikelihood: Tensor | float, inputs: dict[str, Any]) -> Tensor | float:
        """Return a forward pass's share of gamma times the mean loss over the step's labels.

        Args:
            unlikelihood: what the policy says of the pass's rows, ``Outputs.unlikelihood``.
            inputs: the pass.
        """
        return self.weight * unlikelihood / inputs[LABELS] if ROWS in inputs else 0.0
