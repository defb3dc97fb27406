"""Schema of a pipeline file: stages by name, with their parent stage and reward models."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from finetune.recipe.settings import Section, Text

REWARDS = "reward.sources"
"""Recipe key of the rewards of an RL stage."""


class EntrySettings(Section):
    """One stage of a pipeline."""

    model_config = ConfigDict(validate_by_name=False, validate_by_alias=True)

    recipe: Text = Field(description="stage/recipe (sft/quickstart), or the path of a .yaml file")
    start: Text | None = Field(
        None, alias="from", description="earlier stage of this file to initialize from"
    )
    reward: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="earlier stage of this file that trains the reward model, or a list of them"
    )
    given: dict[str, Any] = Field(
        {}, alias="set", description="overrides of the recipe's settings: {train.epochs: 2}"
    )

    @property
    def rewards(self) -> list[str]:
        """Return the reward model stages; may be empty."""
        if isinstance(self.reward, str):
            return [self.reward]
        return self.reward or []


Entries = Annotated[dict[Text, EntrySettings], Field(min_length=1)]


class FileSettings(Section):
    """A pipeline's file."""

    description: str = Field("", description="one line for `llm-align list pipelines`")
    stages: Entries = Field(description="name: {recipe: stage/recipe, from: NAME, reward: NAME, set: {...}}")
    public: Entries | None = Field(None, description="stages for bases other than the embedded one")
