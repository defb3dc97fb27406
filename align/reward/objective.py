"""Reward model training objective: Bradley-Terry loss per head, with margins and AdaMix consistency."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.reward.loss import bradley_terry_losses, consistency_losses, padded_rewards, pairwise_margins
from align.reward.model import completion_scores


@dataclass(frozen=True)
class RewardObjective:
    """The loss of a reward model, shared by the trainer and the pre-flight checks.

    Attributes:
        head_of_source: index of the head of each data source.
        center_rewards_coefficient: coefficient of the reward centering term (arXiv 2312.09244).
        margin_scale: factor on the dataset's margins; None ignores them.
        forward_passes: forward passes per batch; 2 adds the AdaMix consistency loss.
    """

    head_of_source: tuple[int, ...]
    center_rewards_coefficient: float = 0.0
    margin_scale: float | None = None
    forward_passes: int = 1

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return each group's loss (G,) and its zero-padded rewards (G, K).

        Args:
            model: a reward model in any wrapper.
            batch: a ``RewardBatch`` on the model's device.
        """
        rewards = self.rewards(model, batch)
        target_margins = None
        if self.margin_scale is not None:
            target_margins = pairwise_margins(
                batch["margins"], batch["scores"], batch["sizes"], scale=self.margin_scale
            )
        losses = bradley_terry_losses(
            rewards,
            batch["ranks"],
            margins=target_margins,
            center_rewards_coefficient=self.center_rewards_coefficient,
        )
        if self.forward_passes == 2:
            # A second forward pass: AdaMix routes each one at random (arXiv 2205.12410).
            losses = losses + consistency_losses(rewards, self.rewards(model, batch), batch["ranks"])
        return losses, rewards

    def rewards(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the rewards of each group under its head, zero-padded: (G, K)."""
        heads = torch.tensor(self.head_of_source, device=batch["sources"].device)[batch["sources"]]
        return padded_rewards(completion_scores(model, batch), batch["sizes"], heads)
