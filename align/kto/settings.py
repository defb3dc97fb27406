"""What KTO is told: its loss, and the engine that runs it; and what contradicts itself in that."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from align.preference.settings import PreferenceSettings
from finetune.recipe.errors import Problem
from finetune.recipe.settings import Section, TrainSettings

Weight = Annotated[float, Field(gt=0)]


class KtoDataSettings(PreferenceSettings):
    """Judged replies: each stands behind its prompt in a line of its own."""

    packing: Literal[False] = Field(False, description="lines hold one reply")


class KtoSettings(Section):
    """KTO's loss (arXiv 2402.01306, equation 8)."""

    beta: Weight = Field(
        0.1, description="aversion to risk: smaller lets the policy go further from its start"
    )
    desirable_weight: Weight = Field(1.0, description="what a good reply counts")
    undesirable_weight: Weight = Field(1.0, description="what a bad reply counts")


class KtoTrainSettings(TrainSettings):
    """How long and how fast; TRL's trainer runs it."""

    engine: Literal["trl"] = Field("trl", description="TRL's trainer")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-6, description="peak learning rate")
    batch_size: Annotated[int, Field(ge=2)] = Field(32, description="replies per optimizer step")


def of_training(train: TrainSettings) -> Iterator[Problem]:
    """Yield the settings of supervised tuning that are none of KTO's, and passes of one row."""
    if train.neftune_alpha is not None:
        expected = "null: noise would stand in the policy's log-probabilities and not in the reference's"
        found = f"{train.neftune_alpha:g}"
        yield Problem("train.neftune_alpha", found, expected, "train.neftune_alpha=null")
    if train.label_smoothing:
        expected = "0: it spreads a token's probability, and KTO judges whole replies"
        found = f"{train.label_smoothing:g}"
        yield Problem("train.label_smoothing", found, expected, "train.label_smoothing=0")
    if train.micro_batch_size == 1:
        expected = "2 or more: a reply is measured against those beside it in a forward pass"
        yield Problem("train.micro_batch_size", "1", expected, "train.micro_batch_size=auto")
