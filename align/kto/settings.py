"""Recipe sections of stage kto: data, loss and training, and their cross-field checks."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from align.preference.settings import PreferenceSettings
from finetune.recipe.errors import Problem
from finetune.recipe.settings import Section, TrainSettings

PositiveWeight = Annotated[float, Field(gt=0)]


class KTODataSettings(PreferenceSettings):
    """Labeled completions, one per row."""

    packing: Literal[False] = Field(False, description="off: one completion per row")


class KTOSettings(Section):
    """KTO's loss (arXiv 2402.01306, equation 8)."""

    beta: PositiveWeight = Field(
        0.1, description="risk aversion: a smaller beta lets the policy move further from the reference"
    )
    desirable_weight: PositiveWeight = Field(1.0, description="weight of desirable (good) completions")
    undesirable_weight: PositiveWeight = Field(1.0, description="weight of undesirable (bad) completions")


class KTOTrainSettings(TrainSettings):
    """Training settings; TRL's trainer runs the stage."""

    engine: Literal["trl"] = Field("trl", description="TRL's trainer")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-6, description="peak learning rate")
    batch_size: Annotated[int, Field(ge=2)] = Field(32, description="completions per optimizer step")


def train_problems(train: TrainSettings) -> Iterator[Problem]:
    """Yield the SFT settings that KTO does not support, and micro-batches of one row."""
    if train.neftune_alpha is not None:
        expected = "null: NEFTune noise would change the policy's log-probabilities but not the reference's"
        actual = f"{train.neftune_alpha:g}"
        yield Problem("train.neftune_alpha", actual, expected, "train.neftune_alpha=null")
    if train.label_smoothing:
        expected = "0: it smooths token labels, but KTO labels completions"
        actual = f"{train.label_smoothing:g}"
        yield Problem("train.label_smoothing", actual, expected, "train.label_smoothing=0")
    if train.micro_batch_size == 1:
        expected = (
            "2 or more: the KL estimate pairs each prompt with another row's completion of the micro-batch"
        )
        yield Problem("train.micro_batch_size", "1", expected, "train.micro_batch_size=auto")
