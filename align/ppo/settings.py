"""Recipe of stage ppo: PPO hyperparameters, PPO-ptx, early stopping."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.rl.settings import RLSettings
from finetune.recipe.settings import (
    MAX_FLOAT,
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RowsInMemory,
    RowSource,
    Section,
    TrainSettings,
)


class PPOSettings(Section):
    """PPO hyperparameters. Defaults are those of Huang et al. 2024 (arXiv 2403.17031) unless noted."""

    rollout_size: RowsInMemory = Field(
        512, description="completions sampled per rollout, before the policy is updated on them"
    )
    ppo_epochs: PositiveInt = Field(
        4, description="PPO epochs over a rollout, in minibatches of train.batch_size"
    )
    clip_range: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2,
        description="clip the ratio to 1 +- this (TRL: cliprange; arXiv 1707.06347, equation 7)",
    )
    value_clip_range: PositiveFloat | None = Field(
        0.2,
        description="clip the value to +- this around its estimate in the rollout (TRL: cliprange_value); "
        "null: no clipping",
    )
    value_coef: NonNegativeFloat = Field(0.1, description="weight of the value loss (vf_coef)")
    value_init: Literal["auto", "reward", "policy"] = Field(
        "auto",
        description="initialization of the value model: the first reward run that is an adapter "
        "(InstructGPT), or the initial policy with a zero head; auto: reward if there is such a run",
    )
    value_learning_rate: PositiveFloat | None = Field(
        None, description="peak learning rate of the value model; null: train.learning_rate"
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="gamma: discount per token")
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = Field(
        0.95, description="lambda of GAE (arXiv 1506.02438)"
    )
    whiten_rewards: bool = Field(
        False, description="scale per-token rewards to standard deviation 1, mean unchanged"
    )
    whiten_advantages: bool = Field(True, description="normalize advantages to mean 0, standard deviation 1")
    # Not in the paper above, where it is 0.
    entropy_coef: NonNegativeFloat = Field(0.0, description="weight of the entropy bonus")
    kl_coef: NonNegativeFloat = Field(
        0.05, description="coefficient (beta) of the per-token KL penalty to the reference"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="estimator of this KL; the paper uses k1"
    )
    # Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.
    adaptive_kl_target: PositiveFloat | None = Field(
        None, description="target of the adaptive KL controller, nats per completion (6); null: fixed kl_coef"
    )
    kl_horizon: PositiveInt = Field(
        10_000, description="horizon of the adaptive KL controller, in completions"
    )
    # Detail 23, the EOS trick: it replaces the reward of a completion without EOS, whatever that is.
    missing_eos_reward: FiniteFloat | None = Field(
        -1.0, description="reward of a completion without EOS; null: the reward is unchanged"
    )
    normalize_rewards: Literal["none", "running"] = Field(
        "none", description="running: normalize by the running mean and standard deviation of all rewards"
    )
    reward_clip: PositiveFloat | None = Field(None, description="clip rewards to +- this; null: no clipping")
    # Not in the paper; TRL's and other implementations offer it as target_kl.
    target_kl: PositiveFloat | None = Field(
        None,
        description="skip the remaining updates of a rollout once approx_kl to the sampling policy is "
        "above this, nats per token (0.1); null: never",
    )


class PretrainingSettings(Section):
    """PPO-ptx: pretraining loss added to the PPO loss (InstructGPT, arXiv 2203.02155, equation 2)."""

    ROW_SOURCES: ClassVar[tuple[str, ...]] = ("source",)

    weight: NonNegativeFloat = Field(
        0.0, description="gamma: weight of the loss, which is a mean over labels (InstructGPT: 27.8); 0: off"
    )
    source: RowSource | None = Field(
        None, description="conversations in any layout of stage sft, or plain text (column text)"
    )
    batch_size: PositiveInt = Field(8, description="pretraining rows per optimizer step")


class StopSettings(Section):
    """Conditions that stop a run early; the reason is logged."""

    # Gao et al. 2022 (arXiv 2210.10760): the proxy reward keeps rising while the gold reward falls.
    max_gold_drop: Fraction | None = Field(
        0.1,
        description="reward over-optimization: a grader's held-out mean has dropped this far below its best "
        "while the reward has risen, checked every train.evaluate_every steps; null: never",
    )
    max_kl: PositiveFloat | None = Field(
        None, description="maximum KL to the reference, nats per completion; null: never"
    )
    max_length_ratio: Annotated[float, Field(gt=1, le=MAX_FLOAT)] | None = Field(
        None,
        description="length hacking: completions are this many times as long as in the first rollout, and "
        "length correlates with the reward; null: never",
    )
    min_entropy_ratio: Fraction | None = Field(
        0.02, description="collapse: entropy is below this fraction of that in the first rollout; null: never"
    )
    min_eos_rate: Fraction | None = Field(
        0.1, description="collapse: the EOS rate was above this and has dropped below it; null: never"
    )


class PPOTrainSettings(TrainSettings):
    """Training settings of PPO."""

    # Ten times the 3e-6 of Huang et al. 2024 (arXiv 2403.17031) and of TRL's PPOConfig, which train all
    # weights: LoRA needs more.
    learning_rate: PositiveFloat = Field(3e-5, description="peak learning rate")


class Settings(RLSettings):
    """Prompts, rewards, sampling, PPO, PPO-ptx and early stopping."""

    train: PPOTrainSettings = PPOTrainSettings()
    ppo: PPOSettings = PPOSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    stop: StopSettings = StopSettings()
