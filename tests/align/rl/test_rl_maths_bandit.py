"""A bandit with a known optimum, which the PPO maths must find.

Five actions, one token per completion. KL-regularized reward E[r] - beta KL(pi || ref) is largest at
pi* = ref exp(r / beta) / Z, and there the reward less its KL cost is beta log Z whatever the action: the
value's fixed point, at which every advantage is 0 and sampling adds no noise.
"""

import pytest
import torch
from torch import Tensor

from align.rl.maths.advantages import gae, token_rewards
from align.rl.maths.kl import FixedKLController, kl_terms
from align.rl.maths.losses import policy_loss, value_loss
from align.rl.maths.masked import masked_mean

REWARDS = torch.tensor([1.0, 0.5, 0.0, -0.5, 0.8])
REFERENCE = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1]).log()
COMPLETIONS, EPOCHS, ROLLOUTS = 512, 4, 120


def optimum(beta: float) -> tuple[Tensor, float]:
    """Return the best policy and its value."""
    tilted = REFERENCE + REWARDS / beta
    return tilted.softmax(0), beta * tilted.logsumexp(0).item()


def train_ppo(
    beta: float, *, seed: int, estimator: str = "k1", clip_range: float = 0.2
) -> tuple[Tensor, float]:
    """Return policy and value after PPO that starts from the reference."""
    generator = torch.Generator().manual_seed(seed)
    logits, value = REFERENCE.clone().requires_grad_(), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.02)
    mask, lengths = torch.ones(COMPLETIONS, 1, dtype=torch.bool), torch.ones(COMPLETIONS, dtype=torch.long)
    controller = FixedKLController(beta)
    for _ in range(ROLLOUTS):
        actions = torch.multinomial(
            logits.detach().softmax(0), COMPLETIONS, replacement=True, generator=generator
        )
        old = logits.detach().log_softmax(0)[actions, None]
        kl = kl_terms(old, REFERENCE[actions, None], estimator=estimator)
        rewards = token_rewards(kl, REWARDS[actions], lengths, kl_coef=controller.kl_coef)
        values = value.detach().expand(COMPLETIONS, 1)
        advantages_CT, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
        for _ in range(EPOCHS):
            policy = policy_loss(
                logits.log_softmax(0)[actions, None], old, advantages_CT, mask, clip_range=clip_range
            )
            critic = value_loss(value.expand(COMPLETIONS, 1), values, returns, mask, clip_range=clip_range)
            optimizer.zero_grad()
            masked_mean(policy.losses + critic.losses, mask).backward()
            optimizer.step()
        controller = controller.updated(masked_mean(kl, mask).item(), COMPLETIONS)
    return logits.detach().softmax(0), value.item()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_ppo_finds_the_known_optimum(beta: float, seed: int) -> None:
    best, best_value = optimum(beta)
    policy, value = train_ppo(beta, seed=seed)
    assert (policy - best).abs().sum().item() / 2 < 0.01, (policy, best)
    assert value == pytest.approx(best_value, abs=0.01)
    assert (REFERENCE.exp() - best).abs().sum() / 2 > 0.15, "the start is far from it"


def test_without_kl_penalty_the_best_action_wins() -> None:
    policy, value = train_ppo(0.0, seed=0)
    assert policy.argmax() == REWARDS.argmax() and policy.max() > 0.9 and value > 0.95
