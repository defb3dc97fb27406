"""What a pipeline's file says: stages by name, what each goes on from, and which rewards it takes."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from finetune.recipe.settings import Section, Text

REWARDS = "reward.sources"
"""The setting that a stage of reinforcement learning takes its rewards from."""


class EntrySettings(Section):
    """One stage of a pipeline."""

    model_config = ConfigDict(validate_by_name=False, validate_by_alias=True)

    recipe: Text = Field(description="stage/recipe (sft/quickstart), or the path of a .yaml file")
    start: Text | None = Field(
        None, alias="from", description="an earlier stage of this file, whose model goes on"
    )
    reward: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="an earlier stage of this file whose model gives the rewards, or a list of them"
    )
    given: dict[str, Any] = Field(
        {}, alias="set", description="settings in place of the recipe's: {train.epochs: 2}"
    )

    @property
    def rewards(self) -> list[str]:
        """Return the stages that give rewards, none where it names none."""
        if isinstance(self.reward, str):
            return [self.reward]
        return self.reward or []


Entries = Annotated[dict[Text, EntrySettings], Field(min_length=1)]


class FileSettings(Section):
    """A pipeline's file."""

    description: str = Field("", description="one line for `llm-align list pipelines`")
    stages: Entries = Field(description="name: {recipe: stage/recipe, from: NAME, reward: NAME, set: {...}}")
    public: Entries | None = Field(
        None, description="the stages that serve another base than the embedded one"
    )
