"""Recipe section of stage dpo: the loss, the reference and the early stop."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.preference.losses.catalog import Setting, find_loss
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import NonEmptyStr, Section

DEFAULT_LOSS = "dpo"


class DPOSettings(Section):
    """The preference loss, its reference model, and early stopping."""

    NAMED_CHOICES: ClassVar[tuple[str, ...]] = ("loss",)

    loss: NonEmptyStr | dict[str, bool | float | str] = Field(
        DEFAULT_LOSS,
        description="loss name (`llm-align list losses`), or {name: ipo, beta: 0.2, ...}",
    )
    # Precomputed: one forward pass over the rows of the run instead of one in every step, with equal values.
    reference: Literal["precomputed", "live"] = Field(
        "precomputed",
        description="reference log-probabilities: all before step 0, cached on disk; or live in every step",
    )
    # Off: the chosen completions' likelihood falls in most successful DPO runs (arXiv 2404.19733).
    max_chosen_logp_drop: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="stop once the held-out chosen log-probability has dropped by this many nats per token "
        "(0.5), checked every train.evaluate_every steps; null: never",
    )

    @property
    def loss_name(self) -> str:
        return self.loss if isinstance(self.loss, str) else str(self.loss.get("name", DEFAULT_LOSS))

    @property
    def loss_settings(self) -> Mapping[str, Setting]:
        if isinstance(self.loss, str):
            return {}
        return {key: value for key, value in self.loss.items() if key != "name"}

    def problems(self) -> list[Problem]:
        """Return the problems of the loss: unknown name, unknown settings, values out of range."""
        try:
            find_loss(self.loss_name, where="dpo.loss").settings(self.loss_settings, where="dpo.loss")
        except UserError as error:
            return error.problems
        return []
