"""Metrics of RLOO and GRPO: titles of the curves, and the summary before and after training."""

from collections.abc import Sequence

from finetune.training.metric_specs import MetricSpec
from finetune.training.metrics import EVAL_PREFIX

ONLINE_COMPLETION_CURVES = {
    "objective/reward": "reward (mean over completions)",
    "objective/kl_per_completion": "KL to the reference (nats per completion)",
    "val/completion_length": "completion length (tokens)",
    "val/eos_rate": "EOS rate",
    "policy/entropy": "policy entropy (nats per token)",
}
ONLINE_STEP_CURVES = {
    "loss": "training loss",
    "objective/reward_std": "standard deviation of the reward",
    "objective/frac_reward_zero_std": "fraction of prompts with equal rewards in the group",
}
ONLINE_SUMMARY_METRICS = {
    "eval/objective/reward": ("held-out reward", ".3f"),
    "eval/objective/kl_per_completion": ("held-out KL, nats per completion", ".2f"),
    "eval/val/completion_length": ("held-out completion length", ".1f"),
    "eval/val/eos_rate": ("held-out EOS rate", ".1%"),
}
ONLINE_FIRST_LAST_METRICS = (
    "loss",
    "objective/reward",
    "objective/kl_per_completion",
    "val/completion_length",
    "val/eos_rate",
    "policy/entropy",
    "objective/frac_reward_zero_std",
)
"""Training metrics that run.json records for the first and the last steps."""


def online_metric_spec(rewards: Sequence[str]) -> MetricSpec:
    """Return the curves and summary metrics for rewards of these names."""
    source_curves = {f"rewards/{name}": f"reward: {name}" for name in rewards} if len(rewards) > 1 else {}
    held_out_curves = {
        f"{EVAL_PREFIX}{name}": f"held-out {title}"
        for name, title in (ONLINE_COMPLETION_CURVES | source_curves).items()
    }
    return MetricSpec(
        curves=ONLINE_COMPLETION_CURVES | source_curves | ONLINE_STEP_CURVES | held_out_curves,
        summary=ONLINE_SUMMARY_METRICS,
    )
