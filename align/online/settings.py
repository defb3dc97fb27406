"""Recipe of stages rloo and grpo: group sampling, loss, TRL's trainer, and the checks across sections."""

from collections.abc import Collection, Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.dpo.checks import trl_copy_problems
from align.rl.rewards.settings import RewardsSettings
from align.rl.settings import PromptSettings, SamplingSettings
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem
from finetune.recipe.settings import NonNegativeFloat, Section, StageSettings, TrainSettings


class GroupSamplingSettings(SamplingSettings):
    """Sampling of a group of completions per prompt."""

    num_generations: Annotated[int, Field(ge=2)] = Field(4, description="completions per prompt (group size)")
    generation_batch_size: Literal["auto"] = Field(
        "auto", description="TRL samples all completions of a step in one batch"
    )


class OnlineTrainSettings(TrainSettings):
    """Training settings of TRL's trainer; every step trains on newly sampled completions."""

    engine: Literal["trl"] = Field("trl", description="TRL's trainer")
    batch_size: Annotated[int, Field(ge=2)] = Field(
        32, description="completions per optimizer step: prompts times sampling.num_generations"
    )
    # arXiv 2402.03300, section 4.2: the policy's 1e-6, for all weights of 7B parameters.
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-6, description="peak learning rate")
    # Prompts of similar length are often of one kind, and a step should have all kinds.
    group_by_length: bool = Field(False, description="batch prompts of similar length: less padding")


class RLOOSettings(Section):
    """RLOO's loss (arXiv 2402.14740)."""

    SECTION: ClassVar[str] = "rloo"

    beta: NonNegativeFloat = Field(0.05, description="coefficient of the KL penalty in the reward; 0: none")
    normalize_advantages: bool = Field(
        False, description="normalize the advantages of a step to mean 0, standard deviation 1"
    )

    @property
    def trl_arguments(self) -> dict[str, object]:
        """Return these settings as arguments of RLOOConfig."""
        return {
            "beta": self.beta,
            "normalize_advantages": self.normalize_advantages,
            "reward_clip_range": None,
        }


class GRPOSettings(Section):
    """GRPO's loss (arXiv 2402.03300, equation 3)."""

    SECTION: ClassVar[str] = "grpo"

    beta: NonNegativeFloat = Field(0.04, description="weight of the KL to the reference in the loss; 0: none")
    loss: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = Field(
        "grpo",
        description="grpo: mean over each completion's tokens, then over completions; dapo: mean over all "
        "tokens of a step; dr_grpo: sum divided by max_new_tokens; bnpo: mean over a micro-batch",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="divide advantages by the reward standard deviation of the group, of the step, or not",
    )

    @property
    def trl_arguments(self) -> dict[str, object]:
        """Return these settings as arguments of GRPOConfig."""
        return {
            "beta": self.beta,
            "loss_type": self.loss,
            "scale_rewards": self.scale_rewards,
            "importance_sampling_level": "token",
            # Not in the paper: TRL's correction of the KL gradient came later.
            "use_bias_correction_kl": False,
        }


class OnlineSettings(StageSettings):
    """Prompts, rewards, sampling, training; the loss is the stage's own section."""

    data: PromptSettings = PromptSettings()
    train: OnlineTrainSettings = OnlineTrainSettings()
    rewards: RewardsSettings = RewardsSettings()
    sampling: GroupSamplingSettings = GroupSamplingSettings()


def online_problems(
    settings: OnlineSettings, loss_settings: RLOOSettings | GRPOSettings, valid: Collection[str]
) -> Iterator[Problem]:
    """Yield every problem that can be found before anything is loaded; invalid sections are skipped."""
    yield from settings.rewards.problems(settings, valid)
    if "train" in valid:
        yield from _supervised_only_problems(settings.train)
    if {"train", "sampling"} <= set(valid):
        yield from _group_size_problems(settings)
    if "evaluate" in valid and settings.evaluate.exact_match:
        expected = "0: prompts need no reference answer; use a grader or a reward"
        yield Problem("evaluate.exact_match", f"{settings.evaluate.exact_match}", expected)
    if "adapter" in valid:
        yield from trl_copy_problems(settings)
        method = settings.adapter.method
        if loss_settings.SECTION in valid and loss_settings.beta and adapter_traits(method).full_finetuning:
            actual = f"{loss_settings.beta:g} with adapter.method '{method}'"
            expected = "0: TRL's reference would be a second full model, the base as published"
            yield Problem(
                f"{loss_settings.SECTION}.beta",
                actual,
                expected,
                f"{loss_settings.SECTION}.beta=0, or adapter.method=lora",
            )


def _supervised_only_problems(train: TrainSettings) -> Iterator[Problem]:
    if train.neftune_alpha is not None:
        expected = "null: completions were sampled without noise, which would bias their log-probabilities"
        yield Problem("train.neftune_alpha", f"{train.neftune_alpha:g}", expected, "train.neftune_alpha=null")
    if train.label_smoothing:
        expected, actual = "0: RL has no labels to smooth", f"{train.label_smoothing:g}"
        yield Problem("train.label_smoothing", actual, expected, "train.label_smoothing=0")


def _group_size_problems(settings: OnlineSettings) -> Iterator[Problem]:
    batch_size, num_generations = settings.train.batch_size, settings.sampling.num_generations
    if batch_size % num_generations:
        rounded = max(1, batch_size // num_generations) * num_generations
        actual = f"{batch_size}, not a multiple of sampling.num_generations ({num_generations})"
        expected = "complete groups of completions"
        yield Problem("train.batch_size", actual, expected, f"train.batch_size={rounded}")
