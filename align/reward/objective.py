"""What a reward model learns from a batch, in training and in the checks before it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.reward.loss import comparison_losses, disagreements, margin_table, reward_table
from align.reward.model import completion_scores


@dataclass(frozen=True)
class Objective:
    """Which head learns from which source, and what is added to plain Bradley-Terry.

    Attributes:
        heads: for each source the number of its head.
        centring: coefficient that draws rewards to a mean of 0.
        margins: what the data's margins are multiplied with; None: they are left aside.
        passes: with 2 a batch goes through twice, and both predictions are pulled together (AdaMix).
    """

    heads: tuple[int, ...]
    centring: float = 0.0
    margins: float | None = None
    passes: int = 1

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return each group's loss, and its rewards (G, K), 0 where there is no completion.

        Args:
            model: a reward model in any wrapper.
            batch: a ``RewardBatch`` on the model's device.
        """
        rewards = self.rewards(model, batch)
        margins = None
        if self.margins is not None:
            margins = margin_table(batch["margins"], batch["scores"], batch["sizes"], scale=self.margins)
        losses = comparison_losses(rewards, batch["ranks"], margins=margins, centring=self.centring)
        if self.passes == 2:
            losses = losses + disagreements(rewards, self.rewards(model, batch), batch["ranks"])
        return losses, rewards

    def rewards(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the score that each group's own head gives to its completions: (G, K)."""
        heads = torch.tensor(self.heads, device=batch["sources"].device)[batch["sources"]]
        return reward_table(completion_scores(model, batch), batch["sizes"], heads)
