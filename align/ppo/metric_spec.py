"""Metrics of PPO: titles of the curves, and the summary before and after training."""

from align.ppo.stage_settings import Settings
from align.ppo.stop_rule import GOLD_PREFIX
from finetune.recipe.settings import StageSettings
from finetune.training.metric_specs import MetricSpec

PPO_COMPLETION_CURVES = {
    "reward": "reward (mean over completions)",
    "kl": "KL to the reference (k1, nats per completion)",
    "length": "completion length (tokens)",
    "ends": "EOS rate",
    "distinct": "fraction of unique completions",
    "length_reward": "correlation of length and reward",
    "entropy": "policy entropy (nats per token)",
    "perplexity": "perplexity of the completions under the reference",
}
PPO_STEP_CURVES = {
    "loss": "training loss",
    "policy_loss": "policy loss (per token)",
    "value_loss": "value loss (per token)",
    "ratio": "ratio to the sampling policy",
    "clipped": "clip fraction",
    "step_kl": "approx_kl to the sampling policy (k3, nats per token)",
    "score": "shaped reward (mean over completions)",
    "kl_coefficient": "KL coefficient",
    "explained_variance": "explained variance of the value model",
    "seconds_generation": "generation time per rollout (s)",
    "seconds_scoring": "scoring time per rollout (s)",
    "seconds_updates": "update time since the last rollout (s)",
}
PPO_SUMMARY_METRICS = {
    "held_out_reward": ("held-out reward", ".3f"),
    "held_out_kl": ("held-out KL, nats per completion", ".2f"),
    "held_out_length": ("held-out completion length", ".1f"),
    "held_out_ends": ("held-out EOS rate", ".1%"),
    "held_out_perplexity": ("held-out perplexity under the reference", ".2f"),
}


def ppo_metric_spec(settings: StageSettings) -> MetricSpec:
    """Return the curves and summary metrics for the recipe's rewards and graders."""
    assert isinstance(settings, Settings)
    reward_names = [source.metric_name for source in settings.rewards.sources]
    source_curves = (
        {f"reward_{name}": f"reward: {name}" for name in reward_names} if len(reward_names) > 1 else {}
    )
    grader_curves = {
        f"{GOLD_PREFIX}{name}": f"grader: {name} (sampled completions)" for name in settings.evaluate.graders
    }
    held_out_curves = {
        f"held_out_{name}": f"held-out {title}"
        for name, title in (PPO_COMPLETION_CURVES | source_curves | grader_curves).items()
    }
    grader_summary = {f"held_out_{name}": (title, ".3f") for name, title in grader_curves.items()}
    return MetricSpec(
        curves=PPO_COMPLETION_CURVES | source_curves | PPO_STEP_CURVES | held_out_curves,
        summary=PPO_SUMMARY_METRICS | grader_summary,
    )
