r"""AdaLoRA: LoRA as P Lambda Q, whose least important singular values are pruned during training.

Zhang et al. 2023 (arXiv 2303.10512). Equation 3: W + P Lambda Q. Equation 4: the penalty
R(P, Q) = ||P^T P - I||^2 + ||Q Q^T - I||^2, summed over layers (the authors' code: the mean of the norms
without the square). Equations 8 to 10: importance from smoothed sensitivity and its
uncertainty. Equation 12: the budget decreases with a cubic schedule between warmup and cooldown.
"""

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters._targets import resolve_targets
from finetune.adapters._task import peft_task_type
from finetune.adapters.traits import Hooks, Traits
from finetune.recipe.compatibility import Rule
from finetune.recipe.errors import Problem
from finetune.recipe.settings import Dimension, Fraction, NonNegativeFloat, PositiveFloat, StageSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAITS = Traits(
    engines=("native",),
    learning_rate=1e-3,
    training_only=("dropout", "warmup", "cooldown", "penalty"),
    depends_on_steps=True,
)  # the paper, table 8: 5e-4 to 2e-3


class Settings(lora.Settings):
    """LoRA's settings; ``rank`` is the final average rank."""

    method: Literal["adalora"] = Field("adalora", description="LoRA with an adaptive rank per layer")  # type: ignore[assignment]
    rank: Dimension = Field(8, description="average rank per layer at the end")  # the paper, section 4.1
    # 1.5 times the rank: the paper, section 4.1, an initial budget of 1.5 times the final one.
    init_rank: Dimension | None = Field(None, description="initial rank; null: 1.5 times `rank`")
    alpha: PositiveFloat = Field(32.0, description="scale of the low-rank product")  # the authors' scripts
    dropout: Fraction = Field(0.0, description="dropout probability at the input of Q")
    warmup: Fraction = Field(
        0.1, description="fraction of steps before the budget decreases"
    )  # table 8: 5 to 20 %
    cooldown: Fraction = Field(
        0.3, description="fraction of steps after the last allocation"
    )  # table 8: 20 to 60 %
    penalty: NonNegativeFloat = Field(
        0.1, description="weight of the orthogonality penalty (gamma of equation 5)"
    )  # the paper: 0.1

    @property
    def resolved_init_rank(self) -> int:
        """Return the initial rank of every layer."""
        return ceil(1.5 * self.rank) if self.init_rank is None else self.init_rank


def _check_budget(settings: StageSettings) -> Iterator[Problem]:
    adapter = settings.adapter
    assert isinstance(adapter, Settings)
    if adapter.resolved_init_rank <= adapter.rank:
        text = f"{adapter.resolved_init_rank}, with adapter.rank {adapter.rank}"
        yield Problem("adapter.init_rank", text, "more than adapter.rank: ranks are pruned")
    if adapter.warmup + adapter.cooldown >= 1:
        text = f"{adapter.warmup} and {adapter.cooldown}"
        expected = "a sum below 1: the budget decreases between them"
        yield Problem("adapter.warmup, adapter.cooldown", text, expected)


RULES = (
    Rule(
        "adalora-budget",
        message="the budget of ranks decreases: from init_rank to rank, between warmup and cooldown",
        source="arXiv 2303.10512, equation 12",
        find=_check_budget,
        reads=("adapter",),
    ),
)


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the base, quantized or not, with P Lambda Q on its targets.

    Raises:
        UserError: a target matches no layer of this model.
    """
    from peft import AdaLoraConfig, get_peft_model

    target = resolve_targets(model, settings.target)
    config = AdaLoraConfig(
        task_type=peft_task_type(model),
        init_r=settings.resolved_init_rank,
        target_r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target,
        total_step=1,  # required by PEFT; RankBudget sets the schedule
    )
    peft_model: PeftModel = get_peft_model(model, config)
    return peft_model


def hooks(model: "PeftModel", settings: Settings, *, steps: int) -> Hooks:
    """Return the hooks for rank allocation and the orthogonality penalty of P and Q."""
    from finetune.adapters._rank_budget import RankBudget

    budget = RankBudget(
        model,
        warmup=round(settings.warmup * steps),
        cooldown=round(settings.cooldown * steps),
        steps=steps,
        penalty=settings.penalty,
    )
    return Hooks(
        penalty=budget.penalty, after_step=budget.after_step, state=budget.state, restore=budget.restore
    )
