"""Recipe sections of stage kto: data, loss and training; and the stage's rules."""

from typing import Annotated, Literal

from pydantic import Field

from align.preference.settings import PreferenceSettings
from align.shared_rules import PREFERENCE_NEFTUNE, TRL_ONLY, TRL_REFERENCE_ONLY
from finetune.recipe.compatibility import Rule
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


RULES = (
    PREFERENCE_NEFTUNE,
    Rule(
        "kto-label-smoothing",
        {"train.label_smoothing": bool},
        source="arXiv 2402.01306, equation 8: no token labels",
        problem=Problem(
            "train.label_smoothing",
            "{train.label_smoothing:g}",
            "0: it smooths token labels, but KTO labels completions",
            "train.label_smoothing=0",
        ),
    ),
    Rule(
        "kto-micro-batch",
        {"train.micro_batch_size": (1,)},
        source="trl 1.16, trainer/kto_trainer.py: completions rotated by one within each micro-batch",
        problem=Problem(
            "train.micro_batch_size",
            "1",
            "2 or more: the KL estimate pairs each prompt with another row's completion of the micro-batch",
            "train.micro_batch_size=auto",
        ),
    ),
    TRL_REFERENCE_ONLY,
    TRL_ONLY,
)
