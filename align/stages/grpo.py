"""Group relative policy optimization (GRPO): advantages are rewards normalized within a group of completions.

Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), equation 3: A_i = (r_i - mean r) / std r over a prompt's
completions, for every token of a completion, and beta times the KL to the reference (k3, equation 4) in the
loss. There is no value model. The reference is the initial policy. TRL's GRPOTrainer runs it; each step
samples its own completions, and an interrupted run resumes bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from align.online.settings import GRPOSettings, OnlineSettings, online_rules

if TYPE_CHECKING:
    from finetune.training.context import RunContext
    from finetune.training.stage import Method

PUBLIC = "gsm8k"
"""Default recipe for a base other than the bundled one."""


class Settings(OnlineSettings):
    """Prompts, rewards, sampling, training, and the loss."""

    TRL_CONFIG: ClassVar[str] = "GRPOConfig"

    grpo: GRPOSettings = GRPOSettings()


RULES = online_rules("grpo")


def build(ctx: RunContext[Settings]) -> Method:
    """Load tokenizer, prompts and models.

    Raises:
        UserError: the data are invalid, the base cannot be loaded, or a reward run is missing or damaged.
    """
    from align.online.method import load_online_rl

    return load_online_rl(ctx, ctx.settings.grpo)
