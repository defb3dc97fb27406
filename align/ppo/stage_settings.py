"""Recipe of stage ppo: its sections, and the checks across them."""

from collections.abc import Collection, Iterator

from align.ppo.settings import PpoSettings, PretrainingSettings, StopSettings
from align.rl.rewards.settings import RewardsSettings
from align.rl.settings import PromptSettings, SamplingSettings
from finetune.recipe.errors import Problem
from finetune.recipe.settings import StageSettings


class Settings(StageSettings):
    """Prompts, rewards, sampling, PPO, PPO-ptx and early stopping."""

    data: PromptSettings = PromptSettings()
    reward: RewardsSettings = RewardsSettings()
    sampling: SamplingSettings = SamplingSettings()
    ppo: PpoSettings = PpoSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    stop: StopSettings = StopSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return every problem that can be found before anything is loaded."""
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
        expected = "native: TRL 1.16, which is pinned, has no PPO trainer"
        repair = "train.engine=native; `llm-align rloo` and `llm-align grpo` run on TRL"
        yield Problem("train.engine", "'trl'", expected, repair)
    if train.neftune_alpha is not None:
        expected = "null: with noise the ratio to the sampling policy does not start at 1"
        yield Problem("train.neftune_alpha", f"{train.neftune_alpha:g}", expected, "train.neftune_alpha=null")
    if train.label_smoothing:
        expected = "0: RL has no labels to smooth"
        repair = "train.label_smoothing=0"
        yield Problem("train.label_smoothing", f"{train.label_smoothing:g}", expected, repair)


def _sizes(settings: Settings) -> Iterator[Problem]:
    size, batch, ppo = settings.ppo.rollout_size, settings.train.batch_size, settings.ppo
    if size % batch:
        fits = max(1, size // batch) * batch
        found = f"{size}, not a multiple of train.batch_size ({batch})"
        expected = "a multiple of train.batch_size"
        yield Problem("ppo.rollout_size", found, expected, f"ppo.rollout_size={fits}")
    if ppo.kl_target is not None and ppo.kl_horizon <= size / 5:
        found = f"{ppo.kl_horizon} with rollouts of {size} completions"
        expected = "more than a fifth of ppo.rollout_size, or the KL coefficient could become negative"
        yield Problem("ppo.kl_horizon", found, expected, f"ppo.kl_horizon={20 * size}")


def _value(settings: Settings) -> Iterator[Problem]:
    learnt = any(source.run is not None for source in settings.reward.sources)
    if settings.ppo.value_from == "reward" and not learnt and settings.reward.sources:
        found = "'reward', but no source is a reward model"
        yield Problem("ppo.value_from", found, "a reward run among reward.sources", "ppo.value_from=start")
