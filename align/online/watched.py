"""Metrics of RLOO and GRPO: titles of the curves, and the summary before and after training."""

from collections.abc import Sequence

from finetune.training.watched import Watched

REPLIES = {
    "reward": "reward (mean over completions)",
    "kl": "KL to the reference (nats per completion)",
    "length": "completion length (tokens)",
    "ends": "EOS rate",
    "entropy": "policy entropy (nats per token)",
}
STEPS = {
    "loss": "training loss",
    "reward_deviation": "standard deviation of the reward",
    "equal_groups": "fraction of prompts with equal rewards in the group",
}
HELD_OUT = "held_out_"
NUMBERS = {
    "held_out_reward": ("held-out reward", ".3f"),
    "held_out_kl": ("held-out KL, nats per completion", ".2f"),
    "held_out_length": ("held-out completion length", ".1f"),
    "held_out_ends": ("held-out EOS rate", ".1%"),
}
AT_BOTH_ENDS = ("loss", "reward", "kl", "length", "ends", "entropy", "equal_groups")
"""Training metrics that run.json records for the first and the last steps."""


def watched(rewards: Sequence[str]) -> Watched:
    """Return the curves and summary metrics for rewards of these names."""
    parts = {f"reward_{name}": f"reward: {name}" for name in rewards} if len(rewards) > 1 else {}
    held_out = {f"{HELD_OUT}{name}": f"held-out {title}" for name, title in (REPLIES | parts).items()}
    return Watched(curves=REPLIES | parts | STEPS | held_out, numbers=NUMBERS)
