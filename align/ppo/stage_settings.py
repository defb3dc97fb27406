"""The sections of a recipe of stage ppo, and what contradicts itself in them."""

from collections.abc import Collection, Iterator

from align.ppo.settings import PpoSettings, PretrainingSettings, StopSettings
from align.rl.rewards.settings import RewardsSettings
from align.rl.settings import PromptSettings, SamplingSettings
from finetune.recipe.errors import Problem
from finetune.recipe.settings import StageSettings


class Settings(StageSettings):
    """Prompts, rewards, how replies are sampled, how they are learnt from, and when it ends early."""

    data: PromptSettings = PromptSettings()
    reward: RewardsSettings = RewardsSettings()
    sampling: SamplingSettings = SamplingSettings()
    ppo: PpoSettings = PpoSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    stop: StopSettings = StopSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return what contradicts itself, before anything is loaded."""
        sound = set(valid)
        found = list(self.reward.problems(self, valid))
        if "train" in sound:
            found += _train(self)
        if {"ppo", "train"} <= sound:
            found += _sizes(self)
        if {"ppo", "reward"} <= sound:
            found += _value(self)
        if "pretraining" in sound:
            found += self.pretraining.problems()
        return found


def _train(settings: Settings) -> Iterator[Problem]:
    train = settings.train
    if train.engine == "trl":
        expected = "native: TRL has had no PPO trainer since 0.25"
        repair = "train.engine=native; `llm-align rloo` and `llm-align grpo` run on TRL"
        yield Problem("train.engine", "'trl'", expected, repair)
    if train.neftune_alpha is not None:
        expected = "null: the ratio to the policy that sampled would not begin at 1"
        yield Problem("train.neftune_alpha", f"{train.neftune_alpha:g}", expected, "train.neftune_alpha=null")
    if train.label_smoothing:
        expected = "0: there are no labels here"
        repair = "train.label_smoothing=0"
        yield Problem("train.label_smoothing", f"{train.label_smoothing:g}", expected, repair)


def _sizes(settings: Settings) -> Iterator[Problem]:
    size, batch, ppo = settings.ppo.rollout_size, settings.train.batch_size, settings.ppo
    if size % batch:
        fits = max(1, size // batch) * batch
        found = f"{size}, which train.batch_size ({batch}) does not divide"
        expected = "whole optimizer steps, each of train.batch_size replies"
        yield Problem("ppo.rollout_size", found, expected, f"ppo.rollout_size={fits}")
    if ppo.kl_target is not None and ppo.kl_horizon <= size / 5:
        found = f"{ppo.kl_horizon}, and a rollout has {size} replies"
        expected = "more than a fifth of a rollout, or the coefficient could fall below 0"
        yield Problem("ppo.kl_horizon", found, expected, f"ppo.kl_horizon={20 * size}")


def _value(settings: Settings) -> Iterator[Problem]:
    learnt = any(source.run is not None for source in settings.reward.sources)
    if settings.ppo.value_from == "reward" and not learnt and settings.reward.sources:
        found = "'reward', and no reward is learnt"
        yield Problem("ppo.value_from", found, "a reward run among reward.sources", "ppo.value_from=start")
