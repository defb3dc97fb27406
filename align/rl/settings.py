"""Recipe sections shared by the RL stages: prompts, rewards and sampling."""

from typing import Annotated, Literal

from pydantic import Field

from align.rl.rewards.settings import RewardsSettings
from finetune.recipe.settings import AtLeastTwo, DataSettings, PositiveInt, Section, StageSettings


class PromptSettings(DataSettings):
    """Prompts: rows up to the last user turn; a row's own reply is not trained on."""

    max_prompt_length: AtLeastTwo | None = Field(
        None,
        description="maximum number of prompt tokens; null: context length (at most 2048) minus "
        "sampling.max_new_tokens",
    )
    # A prompt without its beginning is another question, and the template's own text is at the beginning.
    overflow: Literal["drop", "truncate"] = Field(
        "drop", description="drop longer prompts, or truncate them from the left"
    )
    max_length: None = Field(None, description="not used: see max_prompt_length and sampling.max_new_tokens")
    loss_on: Literal["assistant"] = Field(
        "assistant", description="loss on the sampled completions, including EOS"
    )
    reasoning: Literal["keep", "strip"] = Field(
        "keep", description="thoughts of earlier replies in a prompt: keep, or remove"
    )
    packing: Literal[False] = Field(False, description="not used: prompts are batched for generation")


class SamplingSettings(Section):
    """Sampling of completions, without top-p and top-k: the loss assumes the full distribution."""

    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = Field(
        1.0, description="divides the logits, in sampling and in the loss"
    )
    max_new_tokens: PositiveInt = Field(64, description="maximum number of completion tokens")
    generation_batch_size: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="generation batch size over all processes; a smaller one needs less memory and more "
        "time, and gives different samples; auto: large enough to keep the device busy",
    )


class RLSettings(StageSettings):
    """The sections of all RL stages."""

    data: PromptSettings = PromptSettings()
    rewards: RewardsSettings = RewardsSettings()
    sampling: SamplingSettings = SamplingSettings()

    @property
    def max_reply_tokens(self) -> int:
        """Return the maximum length of replies to held-out prompts: that of the sampled completions."""
        return self.evaluate.max_new_tokens or self.sampling.max_new_tokens
