"""REINFORCE leave-one-out (RLOO): the baseline is the mean reward of the prompt's other completions.

Ahmadian et al. 2024 (arXiv 2402.14740): of k completions y_i sampled from the policy, the gradient is
sum_i (R(y_i) - mean_{j != i} R(y_j)) grad log pi(y_i|x) / k; R = r(x, y) - beta log(pi(y|x) / ref(y|x)).
There is no value model. The reference is the initial policy. TRL's RLOOTrainer runs it; each step samples its
own completions, and an interrupted run resumes bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from align.online.settings import OnlineSettings, RLOOSettings, online_rules

if TYPE_CHECKING:
    from finetune.training.context import RunContext
    from finetune.training.stage import Method

PUBLIC = "hh"
"""Default recipe for a base other than the bundled one."""


class Settings(OnlineSettings):
    """Prompts, rewards, sampling, training, and the loss."""

    TRL_CONFIG: ClassVar[str] = "RLOOConfig"

    rloo: RLOOSettings = RLOOSettings()


RULES = online_rules("rloo")


def build(ctx: RunContext[Settings]) -> Method:
    """Load tokenizer, prompts and models.

    Raises:
        UserError: the data are invalid, the base cannot be loaded, or a reward run is missing or damaged.
    """
    from align.online.method import load_online_rl

    return load_online_rl(ctx, ctx.settings.rloo)
