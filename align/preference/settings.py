"""The data section of the preference stages."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.settings import DataSettings


class PreferenceSettings(DataSettings):
    """Preference data: how pairs, ranked lists and labels are read, truncated and filtered."""

    # Null: half, as in the DPO authors' code (max_length 512, max_prompt_length 256) and TRL's.
    max_prompt_length: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="tokens kept of a prompt, from its end, if prompt and completion are longer than "
        "max_length; null: half of max_length",
    )
    # The DPO loss compares completions of one prompt (Rafailov et al. 2023, arXiv 2305.18290, equation 7).
    on_different_prompts: Literal["drop", "chosen"] = Field(
        "drop",
        description="a pair whose two prompts differ: drop it, or use the chosen one's prompt for both",
    )
    # Bradley-Terry has no probability for a tie; zephyr's published set keeps pairs of equal scores.
    on_tie: Literal["drop", "keep"] = Field(
        "drop",
        description="chosen and rejected with equal scores: drop the pair, or keep the order of the row",
    )
    # Only the last reply of a conversation is compared.
    loss_on: Literal["assistant"] = Field("assistant", description="the completions, each with its EOS token")
