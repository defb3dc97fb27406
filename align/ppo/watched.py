"""What a reader of a PPO run looks at: curves over the steps, numbers before and after."""

from align.ppo.stage_settings import Settings
from align.ppo.stop_rule import GOLD
from finetune.recipe.settings import StageSettings
from finetune.training.watched import Watched

REPLIES = {
    "reward": "reward (mean over replies)",
    "kl": "distance from the start (k1, nats a reply)",
    "length": "tokens of a reply",
    "ends": "share of replies that end by themselves",
    "distinct": "share of replies that differ",
    "length_reward": "correlation of length and reward",
    "entropy": "entropy of the policy (nats a token)",
    "perplexity": "perplexity of the replies under the start",
}
STEPS = {
    "loss": "training loss",
    "policy_loss": "policy loss (a token)",
    "value_loss": "value loss (a token)",
    "ratio": "ratio to the policy that sampled",
    "clipped": "share of tokens clipped",
    "step_kl": "distance from the policy that sampled (k3, nats a token)",
    "score": "what is maximised of the reward (mean over replies)",
    "kl_coefficient": "cost of a nat of distance",
    "explained_variance": "explained variance of the value",
    "seconds_generation": "seconds of sampling, a rollout",
    "seconds_scoring": "seconds of judging and reading, a rollout",
    "seconds_updates": "seconds of updates since the last rollout",
}
NUMBERS = {
    "held_out_reward": ("held-out reward", ".3f"),
    "held_out_kl": ("held-out distance, nats a reply", ".2f"),
    "held_out_length": ("held-out tokens a reply", ".1f"),
    "held_out_ends": ("held-out replies that end", ".1%"),
    "held_out_perplexity": ("held-out perplexity under the start", ".2f"),
}


def watched(settings: StageSettings) -> Watched:
    """Return the curves and numbers of a run with these rewards and judges."""
    assert isinstance(settings, Settings)
    names = [source.called for source in settings.reward.sources]
    parts = {f"reward_{name}": f"reward: {name}" for name in names} if len(names) > 1 else {}
    gold = {f"{GOLD}{name}": f"judge: {name} (sampled replies)" for name in settings.evaluate.judges}
    held_out = {f"held_out_{name}": f"held-out {title}" for name, title in (REPLIES | parts | gold).items()}
    numbers = {f"held_out_{name}": (title, ".3f") for name, title in gold.items()}
    return Watched(curves=REPLIES | parts | STEPS | held_out, numbers=NUMBERS | numbers)
