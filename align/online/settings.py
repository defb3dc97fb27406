"""Recipe of stages rloo and grpo: group sampling, loss, TRL's trainer, and their rules."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.rl.rewards.settings import REWARD_RULES
from align.rl.settings import RLSettings, SamplingSettings
from align.shared_rules import RL_EXACT_MATCH, RL_LABEL_SMOOTHING, TRL_ONLY, TRL_REFERENCE_ONLY
from finetune.recipe.compatibility import Rule, is_set
from finetune.recipe.errors import Problem
from finetune.recipe.settings import (
    AtLeastTwo,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    TrainSettings,
)


class GroupSamplingSettings(SamplingSettings):
    """Sampling of a group of completions per prompt."""

    num_generations: AtLeastTwo = Field(4, description="completions per prompt (group size)")
    generation_batch_size: Literal["auto"] = Field(
        "auto", description="TRL samples all completions of a step in one batch"
    )


class OnlineTrainSettings(TrainSettings):
    """Training settings of TRL's trainer; every step trains on newly sampled completions."""

    engine: Literal["trl"] = Field("trl", description="TRL's trainer")
    # TRL's sampler reads the prompts of all steps from one list.
    max_steps: Annotated[int, Field(gt=0, le=10**6)] | None = Field(
        None, description="number of optimizer steps; overrides epochs"
    )
    batch_size: AtLeastTwo = Field(
        32, description="completions per optimizer step: prompts times sampling.num_generations"
    )
    # verl, run_qwen3-4b_gsm8k_grpo_lora_merge.sh: with LoRA. For all weights 1e-6 (arXiv 2402.03300, section
    # 4.2; TRL 1.16's GRPOConfig and RLOOConfig).
    learning_rate: PositiveFloat = Field(1e-5, description="peak learning rate")
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
        description="grpo: mean over the tokens of each completion, then over completions; dapo: mean over "
        "all tokens of a step; dr_grpo: sum divided by max_new_tokens; bnpo: mean over a micro-batch",
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


class OnlineSettings(RLSettings):
    """Prompts, rewards, sampling, training; the loss is the stage's own section."""

    train: OnlineTrainSettings = OnlineTrainSettings()
    sampling: GroupSamplingSettings = GroupSamplingSettings()


def _check_group_size(settings: OnlineSettings) -> Iterator[Problem]:
    batch_size, num_generations = settings.train.batch_size, settings.sampling.num_generations
    if batch_size % num_generations:
        rounded = max(1, batch_size // num_generations) * num_generations
        actual = f"{batch_size}, not a multiple of sampling.num_generations ({num_generations})"
        expected = "complete groups of completions"
        yield Problem("train.batch_size", actual, expected, f"train.batch_size={rounded}")


def online_rules(section: str) -> tuple[Rule, ...]:
    """Return the rules of a stage that samples its own completions, by the name of its loss's section."""
    beta = f"{section}.beta"
    return (
        *REWARD_RULES,
        ONLINE_NEFTUNE,
        RL_EXACT_MATCH,
        RL_LABEL_SMOOTHING,
        GROUP_SIZE,
        TRL_REFERENCE_ONLY,
        TRL_ONLY,
        Rule(
            f"{section}-reference-full",
            {beta: bool, "traits.full_finetuning": (True,)},
            source=f"trl 1.16, trainer/{section}_trainer.py: without an adapter, ref_model is the base",
            problem=Problem(
                beta,
                f"{{{beta}:g}} with adapter.method '{{adapter.method}}'",
                "0: TRL's reference would be a second full model, the untrained base",
                f"{beta}=0, or adapter.method=lora",
            ),
        ),
    )


ONLINE_NEFTUNE = Rule(
    "online-neftune",
    {"train.neftune_alpha": is_set},
    source="arXiv 2402.03300, equation 3: the log-probabilities of the sampling policy",
    problem=Problem(
        "train.neftune_alpha",
        "{train.neftune_alpha:g}",
        "null: completions were sampled without noise, which would bias their log-probabilities",
        "train.neftune_alpha=null",
    ),
)
GROUP_SIZE = Rule(
    "group-size",
    message="train.batch_size is a multiple of sampling.num_generations: complete groups of completions",
    source="trl 1.16, trainer/grpo_config.py: generation_batch_size % num_generations",
    find=_check_group_size,
    reads=("train", "sampling"),
)
