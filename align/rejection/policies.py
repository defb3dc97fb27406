"""The policy as it stands before each round, on the base that the reward models share."""

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
    """Gives the policy before a round, one at a time, always from what the round before has saved.

    A run that goes on after a stop and one that never stopped therefore have the same weights.

    Attributes:
        job: the stage at work.
        frozen: the base without an adapter; None where the policy cannot share it.
        rewards: what judges replies; its reward models share the base.
    """

    job: Job
    frozen: Frozen | None
    rewards: Rewards
    _held: tuple[int, Policy] | None = field(default=None)

    def before(self, number: int) -> Policy:
        """Return the policy before a round (from 1); before the first one it is the start.

        Raises:
            UserError: the base cannot be loaded, or saved weights are damaged.
        """
        if self._held is None or self._held[0] != number:
            self._held = None  # its memory is free before the next one is loaded
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
        policy = put_adapter(job, replace(self.frozen, base=same_weights(self.frozen.base)))
        for other in (self.frozen.base, *(model.model for model in self.rewards.models)):
            own_weights(other, [policy.model])
        return policy


def load_policies(job: Job, text: Text) -> Policies:
    """Load the base and the rewards; the policy is loaded when it is asked for.

    An adapter that changes or trains the whole base has one of its own, and so has each reward model then.

    Raises:
        UserError: the base cannot be loaded, or a reward run is not there or damaged.
    """
    settings = job.recipe.settings
    assert isinstance(settings, Settings)
    traits = adapter_traits(settings.adapter.method)
    alone = traits.whole_model or traits.changes_base
    frozen = None if alone else load_frozen(job)
    base = frozen.base if frozen is not None else None
    with job.timed("load"):
        rewards = load_rewards(settings.reward, base=base, tokenizer=text.encoder.tokenizer)
    for note in rewards.notes:
        job.say(note)
    return Policies(job, frozen, rewards)


def round_folder(run: Path, number: int) -> Path:
    """Return the folder of a round: a run of its own."""
    return run / ROUNDS / str(number)


def round_recipe(recipe: Recipe, run: Path, number: int) -> Recipe:
    """Return the recipe of a round's run: it starts where the round before ended, and measures nothing."""
    settings = recipe.settings
    update: dict[str, Any] = {"evaluate": EvaluateSettings(samples=0)}
    if number > 1:
        start = round_folder(run, number - 1)
        begun: dict[str, Any] = {"start": str(start)}
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
