"""Reward model training objective: Bradley-Terry loss per head, with margins and AdaMix consistency."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.reward.loss import comparison_losses, disagreements, margin_table, reward_table
from align.reward.model import completion_scores


@dataclass(frozen=True)
class Objective:
    """The loss of a reward model, shared by the trainer and the pre-flight checks.

    Attributes:
        head_of_source: index of the head of each data source.
        center_rewards_coefficient: coefficient of the reward centering term (arXiv 2312.09244).
        margin_scale: factor on the dataset's margins; None ignores them.
        forward_passes: forward passes per batch; 2 adds the AdaMix consistency loss.
    """

    heads: tuple[int, ...]
    centring: float = 0.0
    margins: float | None = None
    passes: int = 1

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return each group's loss (G,) and its zero-padded rewards (G, K).

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
        """Return the rewards of each group under its head, zero-padded: (G, K)."""
        heads = torch.tensor(self.heads, device=batch["sources"].device)[batch["sources"]]
        return reward_table(completion_scores(model, batch), batch["sizes"], heads)
