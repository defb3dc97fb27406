"""What stage dpo adds to a recipe: what is learnt of comparisons, against what, and when it is enough."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.preference.losses.catalogue import Setting, find_loss
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import Section, Text

DEFAULT_LOSS = "dpo"


class AlignSettings(Section):
    """What is learnt from preferences, against which reference, and when it is enough."""

    NAMED: ClassVar[tuple[str, ...]] = ("loss",)

    loss: Text | dict[str, float | str] = Field(
        DEFAULT_LOSS,
        description="a loss (`llm-align list losses`), or {name: ipo, beta: 0.2, ...}",
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
