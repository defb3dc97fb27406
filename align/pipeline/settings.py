"""Schema of a pipeline file: stages by name, with their parent stage and reward models."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from finetune.recipe.settings import NonEmptyStr, Section

REWARDS_KEY = "rewards.sources"
"""Recipe key of the rewards of an RL stage."""


class StageEntrySettings(Section):
    """One stage of a pipeline."""

    model_config = ConfigDict(validate_by_name=False, validate_by_alias=True)

    recipe: NonEmptyStr = Field(description="stage/recipe (sft/quickstart), or the path of a .yaml file")
    init_from: NonEmptyStr | None = Field(
        None, alias="from", description="earlier stage of this file to initialize from"
    )
    reward: NonEmptyStr | Annotated[list[NonEmptyStr], Field(min_length=1)] | None = Field(
        None, description="earlier stage of this file that trains the reward model, or a list of them"
    )
    overrides: dict[str, Any] = Field(
        {}, alias="set", description="overrides of the recipe's settings: {train.epochs: 2}"
    )

    @property
    def rewards(self) -> list[str]:
        """Return the reward model stages; may be empty."""
        if isinstance(self.reward, str):
            return [self.reward]
        return self.reward or []


StageEntries = Annotated[dict[NonEmptyStr, StageEntrySettings], Field(min_length=1)]


class PipelineSettings(Section):
    """A pipeline's file."""

    description: str = Field("", description="one line for `llm-align list pipelines`")
    stages: StageEntries = Field(
        description="name: {recipe: stage/recipe, from: NAME, reward: NAME, set: {...}}"
    )
    public: StageEntries | None = Field(None, description="stages for bases other than the embedded one")
