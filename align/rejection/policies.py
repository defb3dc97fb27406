"""The policy at the start of each round, on the base that the reward models share."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.rejection.settings import Settings
from align.reward.shared_base import copy_sharing_weights, untie_trained_weights
from align.rl.rewards.loading import load_rewards
from align.rl.rewards.rewards import Rewards
from finetune.recipe.checks import adapter_traits
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import EvaluateSettings
from finetune.training.context import RunContext
from finetune.training.loading import FrozenBase, add_adapter, load_frozen_base, load_policy
from finetune.training.model import Policy
from finetune.training.run_directory import ROUNDS
from finetune.training.text_encoding import TextEncoding


@dataclass
class RoundPolicies:
    """Loads the policy of a round from the weights that the previous round saved, one at a time.

    A resumed run and an uninterrupted one therefore have the same weights.

    Attributes:
        ctx: the run context.
        frozen: the base without an adapter; None if the policy cannot share it.
        rewards: score completions; their reward models share the base.
    """

    ctx: RunContext
    frozen: FrozenBase | None
    rewards: Rewards
    _cached: tuple[int, Policy] | None = field(default=None)

    def policy_for_round(self, round_index: int) -> Policy:
        """Return the policy at the start of a round (from 1); in the first round it is the initial policy.

        Raises:
            UserError: the base cannot be loaded, or saved weights are corrupt.
        """
        if self._cached is None or self._cached[0] != round_index:
            self._cached = None  # free its memory before the next one is loaded
            self._cached = (round_index, self._load(round_index))
        return self._cached[1]

    def _load(self, round_index: int) -> Policy:
        ctx = self.ctx
        if round_index > 1:
            ctx = RunContext(
                round_recipe(self.ctx.recipe, self.ctx.run.path, round_index),
                ctx.run,
                ctx.console,
                ctx.command,
            )
        if self.frozen is None:
            return load_policy(ctx)
        # On a copy of the modules: this round's adapter must not stay on the base of the next.
        policy = add_adapter(ctx, replace(self.frozen, base=copy_sharing_weights(self.frozen.base)))
        for other in (self.frozen.base, *(model.model for model in self.rewards.models)):
            untie_trained_weights(other, [policy.model])
        return policy


def load_round_policies(ctx: RunContext, text: TextEncoding) -> RoundPolicies:
    """Load the base and the rewards; policies are loaded on demand.

    Raises:
        UserError: the base cannot be loaded, or a reward run is missing or damaged.
    """
    settings = ctx.recipe.settings
    assert isinstance(settings, Settings)
    traits = adapter_traits(settings.adapter.method)
    # An adapter that rewrites or trains the base weights cannot share them; reward models load their own.
    is_unshared = traits.full_finetuning or traits.changes_base
    frozen = None if is_unshared else load_frozen_base(ctx)
    base = frozen.base if frozen is not None else None
    with ctx.timed("load"):
        rewards = load_rewards(settings.rewards, base=base, tokenizer=text.encoder.tokenizer)
    for note in rewards.notes:
        ctx.log(note)
    return RoundPolicies(ctx, frozen, rewards)


def round_folder(run: Path, round_index: int) -> Path:
    """Return the folder of a round, which is a run itself."""
    return run / ROUNDS / str(round_index)


def round_recipe(recipe: Recipe, run: Path, round_index: int) -> Recipe:
    """Return the recipe of a round: initialized from the previous round, without evaluation."""
    settings = recipe.settings
    # The rejection run evaluates between rounds; a round only trains.
    update: dict[str, Any] = {"evaluate": EvaluateSettings(samples=0)}
    if round_index > 1:
        parent = round_folder(run, round_index - 1)
        model_update: dict[str, Any] = {"init_from": str(parent)}
        # Full fine-tuning saved a model, which is the base of this round.
        if (parent / "model").is_dir():
            model_update |= {"base": str(parent), "revision": None, "rope": None}
        update["model"] = settings.model.model_copy(update=model_update)
    return replace(
        recipe,
        name=f"{recipe.name}, round {round_index}",
        settings=settings.model_copy(update=update),
        out=round_folder(run, round_index),
        notes=[],
    )
