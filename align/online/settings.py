"""What RLOO and GRPO are told: how many replies, the loss, the engine; and what contradicts itself."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from align.rl.settings import SamplingSettings
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem
from finetune.recipe.settings import Section, StageSettings, TrainSettings

Weight = Annotated[float, Field(ge=0)]


class GroupSamplingSettings(SamplingSettings):
    """How the replies to a prompt are drawn that are compared with each other."""

    samples: Annotated[int, Field(ge=2)] = Field(
        4, description="replies to a prompt, which are compared with each other"
    )


class OnlineTrainSettings(TrainSettings):
    """How long and how fast; TRL's trainer runs it, a step learns from replies that were drawn for it."""

    engine: Literal["trl"] = Field("trl", description="TRL's trainer")
    batch_size: Annotated[int, Field(ge=2)] = Field(
        32, description="replies per optimizer step: prompts times sampling.samples"
    )
    # arXiv 2402.03300, section 4.2: the policy's 1e-6, for all weights of 7B parameters.
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-6, description="peak learning rate")


class RlooSettings(Section):
    """RLOO's loss (arXiv 2402.14740, equation 8)."""

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
        "group", description="advantages are divided by the deviation of their group's rewards, the step's, or not"
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


def of_training(settings: StageSettings, sampling: GroupSamplingSettings, beta: float) -> Iterator[Problem]:
    """Yield what contradicts itself in training, sampling and adapter of a stage."""
    train, method = settings.train, settings.adapter.method
    if train.neftune_alpha is not None:
        expected = "null: noise would stand in the log-probabilities of what was drawn without it"
        yield Problem("train.neftune_alpha", f"{train.neftune_alpha:g}", expected, "train.neftune_alpha=null")
    if train.label_smoothing:
        expected = "0: there are no labels here"
        yield Problem("train.label_smoothing", f"{train.label_smoothing:g}", expected, "train.label_smoothing=0")
    if train.batch_size % sampling.samples:
        whole = max(1, train.batch_size // sampling.samples) * sampling.samples
        found = f"{train.batch_size}, which is no multiple of sampling.samples ({sampling.samples})"
        yield Problem("train.batch_size", found, "whole groups of replies", f"train.batch_size={whole}")
    if settings.evaluate.exact_match:
        expected = "0: prompts need have no answer; a judge or a reward function says what is right"
        yield Problem("evaluate.exact_match", f"{settings.evaluate.exact_match}", expected)
    if adapter_traits(method).whole_model and beta:
        found = f"{beta:g} with adapter.method '{method}'"
        expected = "0: the reference would be a second whole model, which TRL loads as it was published"
        yield Problem("align.beta", found, expected, "align.beta=0, or adapter.method=lora")
