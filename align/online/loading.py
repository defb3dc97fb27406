"""Load the models of RLOO and GRPO: the policy, and reward models on the same base in memory."""

from dataclasses import dataclass

from align.reward.shared_base import base_for_scorers, untie_trained_weights
from align.rl.rewards.loading import load_rewards
from align.rl.rewards.rewards import Rewards
from align.rl.rewards.settings import RewardsSettings
from finetune.recipe.checks import adapter_traits
from finetune.training.context import RunContext
from finetune.training.loading import add_adapter, load_frozen_base
from finetune.training.model import Policy
from finetune.training.text_encoding import TextEncoding


@dataclass(frozen=True)
class OnlineModels:
    """The policy and the rewards."""

    policy: Policy
    rewards: Rewards


def load_online_models(ctx: RunContext, text: TextEncoding, settings: RewardsSettings) -> OnlineModels:
    """Load the base once and attach the policy's adapter and the reward models to it.

    Raises:
        UserError: the base cannot be loaded, the adapter does not fit it, or a reward run is missing or
            damaged.
    """
    frozen = load_frozen_base(ctx)
    traits = adapter_traits(ctx.recipe.settings.adapter.method)
    # An adapter that rewrites base weights (PiSSA) must not change the base of the reward models.
    base = base_for_scorers(frozen.base, changes_base=traits.changes_base)
    rewards = load_rewards(settings, base=base, tokenizer=text.encoder.tokenizer)
    for note in rewards.notes:
        ctx.log(note)
    policy = add_adapter(ctx, frozen)
    # Nor may base weights that the policy trains: reward models get copies of them.
    for model in rewards.models:
        untie_trained_weights(model.model, [policy.model])
    return OnlineModels(policy, rewards)
