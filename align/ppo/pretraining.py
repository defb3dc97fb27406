"""PPO-ptx: mix pretraining gradients into the PPO updates (InstructGPT, arXiv 2203.02155, equation 2)."""

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
    """The rows of the PPO-ptx loss and its weight.

    Attributes:
        rows: conversations with the labels of stage sft.
        collate: collates rows to tensors.
        batch_size: rows per optimizer step.
        weight: gamma, weight of the mean loss over their labels.
        seed: of the row order.
    """

    rows: TokenizedRows
    collate: PaddedCollator
    batch_size: int
    weight: float
    seed: int

    def add_to(self, batches: list[dict[str, Any]], *, step: int, world: World = ALONE) -> None:
        """Distribute the rows of an optimizer step over the micro-batches; ``batches`` are this process's."""
        numbers = rows_of_rollout(len(self.rows), self.batch_size, step, seed=self.seed)
        # Round robin: every micro-batch of every process gets a nearly equal number of rows.
        hands = [numbers[start :: len(batches) * world.size] for start in range(len(batches) * world.size)]
        dealt = [self.collate([self.rows[number] for number in hand]) if hand else None for hand in hands]
        # Labels of the whole step, over all processes: the loss is a mean over them, however they are split.
        labels = sum(len(loss_positions(rows["labels"])[1]) for rows in dealt if rows is not None)
        for batch, rows in zip(batches, dealt[world.rank :: world.size], strict=True):
            if rows is not None:
                batch[ROWS], batch[LABELS] = dict(rows), labels

    def loss(self, unlikelihood: Tensor | float, inputs: dict[str, Any]) -> Tensor | float:
        """Return this micro-batch's part of gamma times the mean loss over the step's labels.

        Args:
            nll: summed NLL of the micro-batch's pretraining rows, ``ActorCriticOutputs.pretraining_nll``.
            inputs: the micro-batch.
        """
        return self.weight * unlikelihood / inputs[LABELS] if ROWS in inputs else 0.0
