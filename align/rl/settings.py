"""What stages that learn from their own replies add to a recipe: prompts, and how replies are drawn."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.settings import DataSettings, Positive, Section


class PromptSettings(DataSettings):
    """What is asked: rows up to the user's last turn; a row's own reply is for readers alone."""

    max_prompt_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="tokens of a prompt at most; null: what the model has beside a reply, 2048 together"
    )
    # A prompt without its beginning is another question, and the template's own words stand there.
    too_long: Literal["drop", "cut"] = Field(
        "drop", description="leave longer prompts out, or cut their beginnings off"
    )
    max_length: None = Field(None, description="none here: max_prompt_length and sampling.max_new_tokens")
    loss_on: Literal["reply"] = Field("reply", description="the replies that are drawn, each with its end")
    packing: Literal[False] = Field(False, description="prompts are answered side by side")


class SamplingSettings(Section):
    """How replies are drawn; from the whole distribution, as the log-probabilities of a loss assume."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="logits are divided by it, in sampling and in the loss"
    )
    max_new_tokens: Positive = Field(64, description="tokens of a reply at most")
    at_once: Positive | Literal["auto"] = Field(
        "auto",
        description="replies drawn side by side, over all processes: fewer need less memory and more time, "
        "and are other draws; auto: as many as keep the device busy",
    )
