"""Metrics of PPO: titles of the curves, and the summary before and after training."""

from align.ppo.stage_settings import Settings
from align.ppo.stop_rule import GOLD
from finetune.recipe.settings import StageSettings
from finetune.training.watched import Watched

REPLIES = {
    "reward": "reward (mean over completions)",
    "kl": "KL to the reference (k1, nats per completion)",
    "length": "completion length (tokens)",
    "ends": "EOS rate",
    "distinct": "fraction of unique completions",
    "length_reward": "correlation of length and reward",
    "entropy": "policy entropy (nats per token)",
    "perplexity": "perplexity of the completions under the reference",
}
STEPS = {
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
NUMBERS = {
    "held_out_reward": ("held-out reward", ".3f"),
    "held_out_kl": ("held-out KL, nats per completion", ".2f"),
    "held_out_length": ("held-out completion length", ".1f"),
    "held_out_ends": ("held-out EOS rate", ".1%"),
    "held_out_perplexity": ("held-out perplexity under the reference", ".2f"),
}


def watched(settings: StageSettings) -> Watched:
    """Return the curves and summary metrics for the recipe's rewards and graders."""
    assert isinstance(settings, Settings)
    names = [source.called for source in settings.reward.sources]
    parts = {f"reward_{name}": f"reward: {name}" for name in names} if len(names) > 1 else {}
    gold = {f"{GOLD}{name}": f"grader: {name} (sampled completions)" for name in settings.evaluate.judges}
    held_out = {f"held_out_{name}": f"held-out {title}" for name, title in (REPLIES | parts | gold).items()}
    numbers = {f"held_out_{name}": (title, ".3f") for name, title in gold.items()}
    return Watched(curves=REPLIES | parts | STEPS | held_out, numbers=NUMBERS | numbers)
