"""Recipe of stage ppo: its sections, and the checks across them."""

from collections.abc import Collection, Iterator

from align.ppo.settings import PPOSettings, PretrainingSettings, StopSettings
from align.rl.rewards.settings import RewardsSettings
from align.rl.settings import PromptSettings, SamplingSettings
from finetune.recipe.errors import Problem
from finetune.recipe.settings import StageSettings


class Settings(StageSettings):
    """Prompts, rewards, sampling, PPO, PPO-ptx and early stopping."""

    data: PromptSettings = PromptSettings()
    rewards: RewardsSettings = RewardsSettings()
    sampling: SamplingSettings = SamplingSettings()
    ppo: PPOSettings = PPOSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    stop: StopSettings = StopSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return every problem that can be found before anything is loaded."""
        valid_sections = set(valid)
        problems = list(self.rewards.problems(self, valid))
        if "train" in valid_sections:
            problems += _train_problems(self)
        if {"ppo", "train"} <= valid_sections:
            problems += _size_problems(self)
        if {"ppo", "rewards"} <= valid_sections:
            problems += _value_init_problems(self)
        if "pretraining" in valid_sections:
            problems += self.pretraining.problems()
        return problems


def _train_problems(settings: Settings) -> Iterator[Problem]:
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


def _size_problems(settings: Settings) -> Iterator[Problem]:
    rollout_size, batch_size, ppo = settings.ppo.rollout_size, settings.train.batch_size, settings.ppo
    # Every PPO epoch then consists of full minibatches.
    if rollout_size % batch_size:
        rounded = max(1, rollout_size // batch_size) * batch_size
        actual = f"{rollout_size}, not a multiple of train.batch_size ({batch_size})"
        expected = "a multiple of train.batch_size"
        yield Problem("ppo.rollout_size", actual, expected, f"ppo.rollout_size={rounded}")
    # A fifth: the controller clips its error to 0.2, so one rollout changes the coefficient by at most 0.2
    # rollout_size / kl_horizon of its value.
    if ppo.adaptive_kl_target is not None and ppo.kl_horizon <= rollout_size / 5:
        actual = f"{ppo.kl_horizon} with rollouts of {rollout_size} completions"
        expected = "more than a fifth of ppo.rollout_size, or the KL coefficient could become negative"
        yield Problem("ppo.kl_horizon", actual, expected, f"ppo.kl_horizon={20 * rollout_size}")


def _value_init_problems(settings: Settings) -> Iterator[Problem]:
    has_reward_model = any(source.run is not None for source in settings.rewards.sources)
    if settings.ppo.value_init == "reward" and not has_reward_model and settings.rewards.sources:
        actual = "'reward', but no source is a reward model"
        yield Problem("ppo.value_init", actual, "a reward run among rewards.sources", "ppo.value_init=policy")
