"""Metrics of PPO: titles of the curves, and the summary before and after training."""

from align.ppo.stage_settings import Settings
from finetune.recipe.settings import StageSettings
from finetune.training.metric_specs import MetricSpec
from finetune.training.metrics import GOLD_PREFIX

PPO_COMPLETION_CURVES = {
    "objective/reward": "reward (mean over completions)",
    "objective/kl_per_completion": "KL to the reference (k1, nats per completion)",
    "val/completion_length": "completion length (tokens)",
    "val/eos_rate": "EOS rate",
    "val/unique_fraction": "fraction of unique completions",
    "val/length_reward_corr": "correlation of length and reward",
    "policy/entropy": "policy entropy (nats per token)",
    "val/ref_perplexity": "perplexity of the completions under the reference",
}
PPO_STEP_CURVES = {
    "loss": "training loss",
    "loss/policy": "policy loss (per token)",
    "loss/value": "value loss (per token)",
    "policy/ratio": "ratio to the sampling policy",
    "policy/clip_frac": "clip fraction",
    "policy/approx_kl": "approx_kl to the sampling policy (k3, nats per token)",
    "objective/shaped_reward": "shaped reward (mean over completions)",
    "objective/kl_coef": "KL coefficient",
    "value/explained_variance": "explained variance of the value model",
    "time/generation": "generation time per rollout (s)",
    "time/scoring": "scoring time per rollout (s)",
    "time/updates": "update time since the last rollout (s)",
}
PPO_SUMMARY_METRICS = {
    "eval/objective/reward": ("held-out reward", ".3f"),
    "eval/objective/kl_per_completion": ("held-out KL, nats per completion", ".2f"),
    "eval/val/completion_length": ("held-out completion length", ".1f"),
    "eval/val/eos_rate": ("held-out EOS rate", ".1%"),
    "eval/val/ref_perplexity": ("held-out perplexity under the reference", ".2f"),
}


def ppo_metric_spec(settings: StageSettings) -> MetricSpec:
    """Return the curves and summary metrics for the recipe's rewards and graders."""
    assert isinstance(settings, Settings)
    reward_names = [source.metric_name for source in settings.rewards.sources]
    source_curves = (
        {f"rewards/{name}": f"reward: {name}" for name in reward_names} if len(reward_names) > 1 else {}
    )
    grader_curves = {
        f"{GOLD_PREFIX}{name}": f"grader: {name} (sampled completions)" for name in settings.evaluate.graders
    }
    held_out_curves = {
        f"eval/{name}": f"held-out {title}"
        for name, title in (PPO_COMPLETION_CURVES | source_curves | grader_curves).items()
    }
    grader_summary = {f"eval/{name}": (title, ".3f") for name, title in grader_curves.items()}
    return MetricSpec(
        curves=PPO_COMPLETION_CURVES | source_curves | PPO_STEP_CURVES | held_out_curves,
        summary=PPO_SUMMARY_METRICS | grader_summary,
    )
