"""What a reader of an RLOO or GRPO run looks at: curves over the steps, numbers before and after."""

from collections.abc import Sequence

from finetune.training.watched import Watched

REPLIES = {
    "reward": "reward (mean over replies)",
    "kl": "distance from the start (nats a reply)",
    "length": "tokens of a reply",
    "ends": "share of replies that end by themselves",
    "entropy": "entropy of the policy (nats a token)",
}
STEPS = {
    "loss": "training loss",
    "reward_deviation": "deviation of the reward",
    "equal_groups": "share of prompts whose replies are all worth the same",
}
HELD_OUT = "held_out_"
NUMBERS = {
    "held_out_reward": ("held-out reward", ".3f"),
    "held_out_kl": ("held-out distance, nats a reply", ".2f"),
    "held_out_length": ("held-out tokens a reply", ".1f"),
    "held_out_ends": ("held-out replies that end", ".1%"),
}
AT_BOTH_ENDS = ("loss", "reward", "kl", "length", "ends", "entropy", "equal_groups")
"""What is recorded of training's first step and of its last ones."""


def watched(rewards: Sequence[str]) -> Watched:
    """Return the curves and numbers of a run with rewards of these names."""
    parts = {f"reward_{name}": f"reward: {name}" for name in rewards} if len(rewards) > 1 else {}
    held_out = {f"{HELD_OUT}{name}": f"held-out {title}" for name, title in (REPLIES | parts).items()}
    return Watched(curves=REPLIES | parts | STEPS | held_out, numbers=NUMBERS)
