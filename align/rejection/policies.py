"""The policy at the start of each round, on the base that the reward models share."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.rejection.settings import Settings
from align.reward.shared_base import own_weights, same_weights
from align.rl.rewards.loading import load_rewards
from align.rl.rewards.rewards import Rewards
from finetune.recipe.checks import adapter_traits
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import EvaluateSettings
from finetune.training.job import Job
from finetune.training.loading import Frozen, Policy, load_frozen, load_policy, put_adapter
from finetune.training.run_directory import ROUNDS
from finetune.training.text import Text


@dataclass
class Policies:
    """Loads the policy of a round from the weights that the previous round saved, one at a time.

    A resumed run and an uninterrupted one therefore have the same weights.

    Attributes:
        ctx: the run context.
        frozen: the base without an adapter; None if the policy cannot share it.
        rewards: score completions; their reward models share the base.
    """

    job: Job
    frozen: Frozen | None
    rewards: Rewards
    _held: tuple[int, Policy] | None = field(default=None)

    def before(self, number: int) -> Policy:
        """Return the policy at the start of a round (from 1); in the first round it is the initial policy.

        Raises:
            UserError: the base cannot be loaded, or saved weights are corrupt.
        """
        if self._held is None or self._held[0] != number:
            self._held = None  # free its memory before the next one is loaded
            self._held = (number, self._load(number))
        return self._held[1]

    def _load(self, number: int) -> Policy:
        job = self.job
        if number > 1:
            job = Job(
                round_recipe(self.job.recipe, self.job.run.path, number), job.run, job.console, job.command
            )
        if self.frozen is None:
            return load_policy(job)
        # On a copy of the modules: this round's adapter must not stay on the base of the next.
        policy = put_adapter(job, replace(self.frozen, base=same_weights(self.frozen.base)))
        for other in (self.frozen.base, *(model.model for model in self.rewards.models)):
            own_weights(other, [policy.model])
        return policy


def load_policies(job: Job, text: Text) -> Policies:
    """Load the base and the rewards; policies are loaded on demand.

    Raises:
        UserError: the base cannot be loaded, or a reward run is missing or damaged.
    """
    settings = job.recipe.settings
    assert isinstance(settings, Settings)
    traits = adapter_traits(settings.adapter.method)
    # An adapter that rewrites or trains the base weights cannot share them; reward models load their own.
    alone = traits.whole_model or traits.changes_base
    frozen = None if alone else load_frozen(job)
    base = frozen.base if frozen is not None else None
    with job.timed("load"):
        rewards = load_rewards(settings.reward, base=base, tokenizer=text.encoder.tokenizer)
    for note in rewards.notes:
        job.say(note)
    return Policies(job, frozen, rewards)


def round_folder(run: Path, number: int) -> Path:
    """Return the folder of a round, which is a run itself."""
    return run / ROUNDS / str(number)


def round_recipe(recipe: Recipe, run: Path, number: int) -> Recipe:
    """Return the recipe of a round: initialized from the previous round, without evaluation."""
    settings = recipe.settings
    # The rejection run evaluates between rounds; a round only trains.
    update: dict[str, Any] = {"evaluate": EvaluateSettings(samples=0)}
    if number > 1:
        start = round_folder(run, number - 1)
        begun: dict[str, Any] = {"start": str(start)}
        # Full fine-tuning saved a model, which is the base of this round.
        if (start / "model").is_dir():
            begun |= {"base": str(start), "revision": None, "rope": None}
        update["model"] = settings.model.model_copy(update=begun)
    return replace(
        recipe,
        name=f"{recipe.name}, round {number}",
        settings=settings.model_copy(update=update),
        out=round_folder(run, number),
        notes=[],
    )
