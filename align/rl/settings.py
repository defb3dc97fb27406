"""Recipe sections shared by the RL stages: prompts and sampling."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.settings import DataSettings, PositiveInt, Section


class PromptSettings(DataSettings):
    """Prompts: rows up to the last user turn; a row's own reply is not trained on."""

    max_prompt_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="maximum prompt tokens; null: context length less the completion, 2048 together"
    )
    # A prompt without its beginning is another question, and the template's own text is at the beginning.
    overflow: Literal["drop", "truncate"] = Field(
        "drop", description="drop longer prompts, or truncate them from the left"
    )
    max_length: None = Field(None, description="not used: see max_prompt_length and sampling.max_new_tokens")
    loss_on: Literal["assistant"] = Field("assistant", description="sampled completions, including EOS")
    packing: Literal[False] = Field(False, description="not used: prompts are batched for generation")


class SamplingSettings(Section):
    """Sampling of completions; without top-p or top-k, as the loss's log-probabilities assume."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="divides the logits, in sampling and in the loss"
    )
    max_new_tokens: PositiveInt = Field(64, description="maximum completion tokens")
    generation_batch_size: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="generation batch size over all processes: smaller needs less memory and more time, and "
        "gives other samples; auto: as many as keep the device busy",
    )
