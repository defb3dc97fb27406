"""KL to the reference policy per token (k1, k2, k3), and fixed and adaptive KL controllers."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from align.preference.losses.metrics import kl_k1, kl_k2, kl_k3

ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
LARGEST_ERROR = 0.2
"""Bound of the relative error in the adaptive KL controller (arXiv 1909.08593, section 2.2)."""


def kl_terms(logps: Tensor, reference_logps: Tensor, *, estimator: str) -> Tensor:
    """Return an estimate of KL(policy || reference) per sampled token, without gradient.

    With log r = log pi - log ref: k1 = log r, k2 = (log r)^2 / 2, k3 = 1/r - 1 + log r (J. Schulman,
    "Approximating KL divergence", 2020). Over tokens that the policy sampled, the means of k1 and k3 are the
    divergence; k1 has a high variance and its terms may be negative. A penalty inside the reward is k1 in the
    papers (arXiv 1909.08593, equation 2): its sum over a completion is log pi(y) - log ref(y).

    Args:
        logps: (C, T), or any shape, of the tokens under the policy that sampled them.
        reference_logps: the same under the reference policy.
        estimator: "k1", "k2" or "k3".

    Returns:
        The shape of ``logps``. For r = 2: ln 2, (ln 2)^2 / 2, and 1/2 - 1 + ln 2.

    >>> from torch import tensor
    >>> [round(kl_terms(tensor([0.6931472]), tensor([0.0]), estimator=k).item(), 4) for k in ESTIMATORS]
    [0.6931, 0.2402, 0.1931]
    """
    return ESTIMATORS[estimator](logps, reference_logps)


@dataclass(frozen=True, slots=True)
class FixedKl:
    """Fixed KL coefficient.

    Attributes:
        kl_coef: beta, weight of the KL penalty; 0.05 in arXiv 2403.17031.

    >>> FixedKl(0.05).after(kl=100.0, episodes=64)
    FixedKl(coefficient=0.05)
    """

    coefficient: float

    def after(self, kl: float, episodes: int) -> "FixedKl":
        """Return the controller after a rollout: unchanged."""
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveKl:
    """Adaptive KL controller: the coefficient rises while the KL is above its target, and falls while below.

    e = clip((KL - target) / target, -0.2, 0.2), beta' = beta (1 + e n / horizon) (arXiv 1909.08593, section
    2.2, whose K_beta is n / horizon; n counts completions and the horizon is 10,000 in its code).

    Attributes:
        kl_coef: beta, weight of the KL penalty.
        target: mean KL in nats per completion.
        horizon: in completions; larger is slower, and a rollout has fewer than five times as many.

    Half above the target counts as 0.2; 0.5 (1 + 0.2 1000 / 800):

    >>> AdaptiveKl(coefficient=0.5, target=6.0, horizon=800).after(kl=9.0, episodes=1000)
    AdaptiveKl(coefficient=0.625, target=6.0, horizon=800)
    """

    coefficient: float
    target: float
    horizon: float

    def after(self, kl: float, episodes: int) -> "AdaptiveKl":
        """Return the controller after a rollout, given its mean KL in nats per completion."""
        assert math.isfinite(kl), f"KL is {kl}"
        assert LARGEST_ERROR * episodes < self.horizon, "the coefficient would fall below 0"
        # Proportional control with a bounded error, so that one bad rollout changes the coefficient little.
        error = (kl - self.target) / self.target
        held = min(max(error, -LARGEST_ERROR), LARGEST_ERROR)
        return replace(self, coefficient=self.coefficient * (1 + held * episodes / self.horizon))
