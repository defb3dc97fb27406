"""The finding on the held-out reward of a finished RL run."""

from finetune.evaluation.small_samples import MeanChange
from finetune.training.findings import Finding


def reward_finding(reward: MeanChange, *, raise_gain: str) -> Finding:
    """Return the finding on the change of the held-out reward, whatever the rewards' scale.

    Args:
        reward: the change over the same prompts.
        raise_gain: the action if no change is shown.
    """
    evidence = f"held-out {reward.describe()}"
    if reward.is_conclusive and reward.gain < 0:
        action = "lower train.learning_rate"
        return Finding("reward", evidence, "the policy earns a lower reward than before", action)
    if reward.is_conclusive:
        return Finding("reward", evidence, "the policy earns a higher reward")
    if not reward.is_precise:
        return Finding("reward", evidence, "too few held-out prompts to tell")
    return Finding("reward", evidence, "no change that chance does not explain", raise_gain)
