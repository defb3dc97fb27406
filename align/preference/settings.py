"""What stages that learn from completions add to a recipe: how data is read, and what is learnt of it."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.preference.losses import Setting, find_loss
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings, Section, Text

DEFAULT_LOSS = "dpo"


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


class AlignSettings(Section):
    """What is learnt from preferences, against which reference, and when it is enough."""

    NAMED: ClassVar[tuple[str, ...]] = ("loss",)

    loss: Text | dict[str, float | str] = Field(
        DEFAULT_LOSS, description="a loss of align/preference/, or with its settings: {name: ipo, beta: 0.2}"
    )
    # Precomputed: one pass over what the run uses in place of one in every step (the numbers are the same).
    reference: Literal["precomputed", "live"] = Field(
        "precomputed",
        description="the start's log-probabilities: all before step 0, kept on disk; or anew in every step",
    )
    # Off: DPO lowers the chosen completions' likelihood in most runs that end well (arXiv 2404.19733).
    stop_when_chosen_falls: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="stop once held-out chosen completions have lost this many nats per token (0.5); null: "
        "never. Measured every train.evaluate_every steps",
    )

    @property
    def loss_name(self) -> str:
        """Return the loss's name."""
        return self.loss if isinstance(self.loss, str) else str(self.loss.get("name", DEFAULT_LOSS))

    @property
    def loss_settings(self) -> Mapping[str, Setting]:
        """Return what the recipe says of the loss beside its name."""
        if isinstance(self.loss, str):
            return {}
        return {key: value for key, value in self.loss.items() if key != "name"}

    def problems(self) -> list[Problem]:
        """Return what is wrong with the loss: its name, its settings, numbers outside their range."""
        try:
            find_loss(self.loss_name, where="align.loss").settings(self.loss_settings, where="align.loss")
        except UserError as error:
            return error.problems
        return []


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
