"""What RLOO and GRPO are told: how many replies, the loss, the engine; and what contradicts itself."""

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field

from align.dpo.checks import copied_by_trl
from align.rl.rewards.settings import RewardsSettings
from align.rl.settings import PromptSettings, SamplingSettings
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem
from finetune.recipe.settings import Section, StageSettings, TrainSettings

Weight = Annotated[float, Field(ge=0)]


class GroupSamplingSettings(SamplingSettings):
    """How the replies to a prompt are drawn that are compared with each other."""

    samples: Annotated[int, Field(ge=2)] = Field(
        4, description="replies to a prompt, which are compared with each other"
    )
    at_once: Literal["auto"] = Field("auto", description="TRL draws all replies of a step side by side")


class OnlineTrainSettings(TrainSettings):
    """How long and how fast; TRL's trainer runs it, a step learns from replies that were drawn for it."""

    engine: Literal["trl"] = Field("trl", description="TRL's trainer")
    batch_size: Annotated[int, Field(ge=2)] = Field(
        32, description="replies per optimizer step: prompts times sampling.samples"
    )
    # arXiv 2402.03300, section 4.2: the policy's 1e-6, for all weights of 7B parameters.
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-6, description="peak learning rate")
    # Prompts of a length are often of a kind, and a step should see all kinds.
    group_by_length: bool = Field(False, description="steps of prompts of similar length: less padding")


class RlooSettings(Section):
    """RLOO's loss (arXiv 2402.14740)."""

    beta: Weight = Field(
        0.05, description="what a nat of KL from the start costs, taken off a reply's reward; 0: none"
    )
    normalise: bool = Field(False, description="advantages of a step to mean 0, deviation 1")

    @property
    def arguments(self) -> dict[str, object]:
        """Return TRL's names for them."""
        return {"beta": self.beta, "normalize_advantages": self.normalise, "reward_clip_range": None}


class GrpoSettings(Section):
    """GRPO's loss (arXiv 2402.03300, equation 3)."""

    beta: Weight = Field(0.04, description="weight of the KL from the start, in the loss; 0: none")
    loss: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = Field(
        "grpo",
        description="grpo: the mean over each reply's tokens, then over replies; dapo: over all tokens of a "
        "step; dr_grpo: their sum over max_new_tokens; bnpo: over a forward pass",
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group",
        description="advantages are divided by the deviation of rewards in their group, in the step, or not",
    )

    @property
    def arguments(self) -> dict[str, object]:
        """Return TRL's names for them; its corrections of the KL's gradient are later than the paper."""
        return {
            "beta": self.beta,
            "loss_type": self.loss,
            "scale_rewards": self.scale,
            "importance_sampling_level": "token",
            "use_bias_correction_kl": False,
        }


class OnlineSettings(StageSettings):
    """Prompts, rewards, how replies are drawn; what is learnt from them is the stage's own section."""

    data: PromptSettings = PromptSettings()
    train: OnlineTrainSettings = OnlineTrainSettings()
    reward: RewardsSettings = RewardsSettings()
    sampling: GroupSamplingSettings = GroupSamplingSettings()


def contradictions(
    settings: OnlineSettings, align: RlooSettings | GrpoSettings, valid: Collection[str]
) -> Iterator[Problem]:
    """Yield what contradicts itself, before anything is loaded; unsound sections are passed over."""
    yield from settings.reward.problems(settings, valid)
    if "train" in valid:
        yield from _of_supervised_tuning(settings.train)
    if {"train", "sampling"} <= set(valid):
        yield from _groups(settings)
    if "evaluate" in valid and settings.evaluate.exact_match:
        expected = "0: prompts need have no answer; a judge or a reward says what is right"
        yield Problem("evaluate.exact_match", f"{settings.evaluate.exact_match}", expected)
    if "adapter" in valid:
        yield from copied_by_trl(settings)
        method = settings.adapter.method
        if "align" in valid and align.beta and adapter_traits(method).whole_model:
            found = f"{align.beta:g} with adapter.method '{method}'"
            expected = "0: TRL's reference would be a second whole model, the base as it was published"
            yield Problem("align.beta", found, expected, "align.beta=0, or adapter.method=lora")


def _of_supervised_tuning(train: TrainSettings) -> Iterator[Problem]:
    if train.neftune_alpha is not None:
        expected = "null: noise would stand in the log-probabilities of what was drawn without it"
        yield Problem("train.neftune_alpha", f"{train.neftune_alpha:g}", expected, "train.neftune_alpha=null")
    if train.label_smoothing:
        expected, found = "0: there are no labels here", f"{train.label_smoothing:g}"
        yield Problem("train.label_smoothing", found, expected, "train.label_smoothing=0")


def _groups(settings: OnlineSettings) -> Iterator[Problem]:
    batch, samples = settings.train.batch_size, settings.sampling.samples
    if batch % samples:
        whole = max(1, batch // samples) * samples
        found = f"{batch}, which is no multiple of sampling.samples ({samples})"
        expected = "whole groups of replies, each to one prompt"
        yield Problem("train.batch_size", found, expected, f"train.batch_size={whole}")
