"""What stage ppo adds to a recipe: rollouts, their advantages, updates, and when the run is to end early."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.errors import Problem
from finetune.recipe.settings import Positive, Section, Share, Text

Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class PpoSettings(Section):
    """How completions become advantages, and advantages updates.

    Defaults are those of Huang et al. 2024 (arXiv 2403.17031) where nothing else is said.
    """

    rollout_size: Positive = Field(
        512, description="completions sampled before the policy is updated with them"
    )
    epochs: Positive = Field(
        4, description="times that a rollout is learnt from, train.batch_size of it a step"
    )
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="the ratio to the policy that sampled counts up to 1 +- this (PPO, equation 7)"
    )
    value_clip: Rate | None = Field(
        0.2, description="a value moves up to this far from what it was at the rollout; null: freely"
    )
    value_coefficient: Weight = Field(0.1, description="weight of the value's loss")
    value_from: Literal["auto", "reward", "start"] = Field(
        "auto",
        description="where the value's adapter begins: the reward model's (InstructGPT), or the policy's "
        "start with a head of zeros; auto: reward where there is a learnt one",
    )
    value_learning_rate: Rate | None = Field(
        None, description="peak learning rate of the value's adapter and head; null: train.learning_rate"
    )
    discount: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="gamma: weight of a reward one token later"
    )
    trace: Annotated[float, Field(ge=0, le=1)] = Field(
        0.95, description="lambda of generalized advantage estimation (arXiv 1506.02438)"
    )
    whiten_rewards: bool = Field(False, description="bring the tokens' rewards to deviation 1, mean kept")
    whiten_advantages: bool = Field(True, description="bring advantages to mean 0 and deviation 1")
    # Not in the paper above, where it is 0.
    entropy_coefficient: Weight = Field(0.0, description="weight of the policy's entropy, which it raises")
    kl_coefficient: Weight = Field(
        0.05, description="what a nat of distance from the start costs, at every token"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="how that distance is estimated from one sample; k1 is the paper's"
    )
    # Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.
    kl_target: Rate | None = Field(
        None, description="adapt the coefficient to this distance, nats a reply (6); null: fixed"
    )
    kl_horizon: Positive = Field(10_000, description="replies in which the coefficient adapts")
    # Detail 23, the EOS trick: whatever its score is, a reply without an end gets this.
    missing_end: float | None = Field(
        -1.0, description="score of a reply that did not end in time; null: what the reward says"
    )
    normalise: Literal["none", "running"] = Field(
        "none", description="running: scores less the mean of all so far, over their deviation"
    )
    clip_scores: Rate | None = Field(None, description="scores count up to this far from 0; null: as is")
    # Not in the paper; TRL's and other implementations offer it as target_kl.
    epoch_stop_kl: Rate | None = Field(
        None,
        description="leave the rest of a rollout's updates out once the policy is this far from the one that "
        "sampled it, nats a token (0.1); null: never",
    )


class PretrainingSettings(Section):
    """PPO-ptx: what the model had learnt before is learnt on beside the rewards (InstructGPT, equation 2)."""

    weight: Weight = Field(
        0.0, description="gamma: weight of its loss, a mean over labels; InstructGPT: 27.8; 0: none"
    )
    source: Text | None = Field(
        None, description="its rows, of any layout of stage sft: the data of pretraining or of sft"
    )
    batch_size: Positive = Field(8, description="its rows in an optimizer step")

    def problems(self) -> Iterator[Problem]:
        """Yield what contradicts itself."""
        if self.weight and self.source is None:
            repair = "pretraining.source=FILE, or pretraining.weight=0"
            yield Problem("pretraining.source", "null, and it has a weight", "a source of rows", repair)
        if self.source is not None and not self.weight:
            repair = "pretraining.weight=1, or leave the source out"
            yield Problem("pretraining.weight", "0, and it has a source", "a weight", repair)


class StopSettings(Section):
    """When a run is not worth going on with; the reason is told."""

    # Gao et al. 2022 (arXiv 2210.10760): the learnt reward rises on while the true one falls.
    gold_falls: Share | None = Field(
        0.1,
        description="over-optimised: a judge's held-out mean has fallen this far below its best while the "
        "reward has risen; null: never. Measured every train.evaluate_every steps",
    )
    kl: Rate | None = Field(None, description="too far from the start: nats a held-out reply; null: never")
    longer: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="length hacking: replies are this many times as long as at the start, and the longer "
        "the better rewarded; null: never",
    )
    entropy: Share | None = Field(
        0.02, description="collapsed: the policy's entropy is below this share of the start's; null: never"
    )
    ends: Share | None = Field(
        0.1, description="collapsed: fewer replies than this end by themselves, and more did; null: never"
    )
