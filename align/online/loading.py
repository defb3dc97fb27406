"""Load the models of RLOO and GRPO: the policy, and reward models on the same base in memory."""

from dataclasses import dataclass

from align.reward.shared_base import base_for_scorers, own_weights
from align.rl.rewards.loading import load_rewards
from align.rl.rewards.rewards import Rewards
from align.rl.rewards.settings import RewardsSettings
from finetune.recipe.checks import adapter_traits
from finetune.training.job import Job
from finetune.training.loading import Policy, load_frozen, put_adapter
from finetune.training.text import Text


@dataclass(frozen=True)
class Judged:
    """The policy and the rewards."""

    policy: Policy
    rewards: Rewards


def load_judged(job: Job, text: Text, settings: RewardsSettings) -> Judged:
    """Load the base once and attach the policy's adapter and the reward models to it.

    Raises:
        UserError: the base cannot be loaded, the adapter does not fit it, or a reward run is missing or
            damaged.
    """
    frozen = load_frozen(job)
    traits = adapter_traits(job.recipe.settings.adapter.method)
    # An adapter that rewrites base weights (PiSSA) must not change the base of the reward models.
    base = base_for_scorers(frozen.base, rewritten=traits.changes_base)
    rewards = load_rewards(settings, base=base, tokenizer=text.encoder.tokenizer)
    for note in rewards.notes:
        job.say(note)
    policy = put_adapter(job, frozen)
    # Nor may base weights that the policy trains: reward models get copies of them.
    for model in rewards.models:
        own_weights(model.model, [policy.model])
    return Judged(policy, rewards)
