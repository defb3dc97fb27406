"""What stages that learn from completions add to a recipe: how data is read, and what is learnt of it."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.errors import Problem
from finetune.recipe.settings import DataSettings, Section, Text


class PreferenceSettings(DataSettings):
    """What is preferred to what, and how it is written down."""

    # Null: half, as in the DPO authors' code (max_length 512, max_prompt_length 256) and TRL's.
    max_prompt_length: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="tokens that a prompt keeps, at its end, where prompt and completion are longer than "
        "max_length; null: half of it",
    )
    # DPO's loss compares completions of one prompt (Rafailov et al. 2023, arXiv 2305.18290, equation 7).
    on_different_prompts: Literal["drop", "chosen"] = Field(
        "drop",
        description="a pair whose two prompts differ: drop it, or answer the chosen one's prompt with both",
    )
    # Bradley-Terry has no probability for a tie; zephyr's published set keeps pairs of equal scores.
    on_tie: Literal["drop", "keep"] = Field(
        "drop",
        description="chosen and rejected of equal score: drop the pair, or keep the order that the row says",
    )
    # The reply that is preferred or not is the conversation's last.
    loss_on: Literal["reply"] = Field("reply", description="the completions, each with its end token")


class HindsightSettings(Section):
    """Feedback in words, in the language of the data."""

    good: Text = Field(
        "Give a good answer.", description="asks for the best completion, in training and later"
    )
    bad: Text = Field("Give a bad answer.", description="asks for the worst completion, in training alone")

    def problems(self) -> list[Problem]:
        """Return what contradicts itself."""
        if self.good.strip() != self.bad.strip():
            return []
        return [Problem("hindsight.bad", "the same as hindsight.good", "other words", "hindsight.bad=...")]
