"""Metrics of RLOO and GRPO: titles of the curves, and the summary before and after training."""

from collections.abc import Sequence

from finetune.training.metric_specs import MetricSpec

ONLINE_COMPLETION_CURVES = {
    "reward": "reward (mean over completions)",
    "kl": "KL to the reference (nats per completion)",
    "length": "completion length (tokens)",
    "ends": "EOS rate",
    "entropy": "policy entropy (nats per token)",
}
ONLINE_STEP_CURVES = {
    "loss": "training loss",
    "reward_deviation": "standard deviation of the reward",
    "equal_groups": "fraction of prompts with equal rewards in the group",
}
HELD_OUT_PREFIX = "held_out_"
ONLINE_SUMMARY_METRICS = {
    "held_out_reward": ("held-out reward", ".3f"),
    "held_out_kl": ("held-out KL, nats per completion", ".2f"),
    "held_out_length": ("held-out completion length", ".1f"),
    "held_out_ends": ("held-out EOS rate", ".1%"),
}
ONLINE_FIRST_LAST_METRICS = ("loss", "reward", "kl", "length", "ends", "entropy", "equal_groups")
"""Training metrics that run.json records for the first and the last steps."""


def online_metric_spec(rewards: Sequence[str]) -> MetricSpec:
    """Return the curves and summary metrics for rewards of these names."""
    source_curves = {f"reward_{name}": f"reward: {name}" for name in rewards} if len(rewards) > 1 else {}
    held_out_curves = {
        f"{HELD_OUT_PREFIX}{name}": f"held-out {title}"
        for name, title in (ONLINE_COMPLETION_CURVES | source_curves).items()
    }
    return MetricSpec(
        curves=ONLINE_COMPLETION_CURVES | source_curves | ONLINE_STEP_CURVES | held_out_curves,
        summary=ONLINE_SUMMARY_METRICS,
    )
