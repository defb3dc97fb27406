"""Recipe section of stage dpo: the loss, the reference and the early stop; and the stage's rules."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field

from align.preference.losses.catalog import Setting, find_loss
from align.preference.settings import PREFERENCE_SELECT, PROMPT_LENGTH
from align.shared_rules import CONSISTENCY, PREFERENCE_NEFTUNE, TRL_REFERENCE
from finetune.recipe.compatibility import Rule, caught, is_set
from finetune.recipe.errors import Problem, UserError, one_of
from finetune.recipe.settings import NonEmptyStr, PositiveFloat, Section, TrainSettings

DEFAULT_LOSS = "dpo"
TRL_LOSS_TYPES = {
    "dpo": "sigmoid",
    "robust": "robust",
    "ipo": "ipo",
    "hinge": "hinge",
    "exo": "exo_pair",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}
"""Our loss -> TRL's. No cDPO, because TRL's `sigmoid` has no label smoothing; no RPO, because TRL averages
the NLL over all tokens of a batch and not over pairs."""
NATIVE_ENGINE_REPAIR = "train.engine=native"


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
        description="reference log-probabilities: precomputed before step 0 and cached, or live in each step",
    )
    # Off: the chosen completions' likelihood falls in most successful DPO runs (arXiv 2404.19733).
    max_chosen_logp_drop: PositiveFloat | None = Field(
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


class DPOTrainSettings(TrainSettings):
    """Training settings of the preference losses."""

    # alignment-handbook, zephyr-7b-beta/dpo/config_qlora.yaml: with LoRA. For all weights 1e-6 (arXiv
    # 2305.18290, appendix B; TRL 1.16's DPOConfig).
    learning_rate: PositiveFloat = Field(5e-6, description="peak learning rate")


def trl_loss_arguments(loss: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the DPOConfig arguments for a loss of the catalog.

    Args:
        loss: its name.
        settings: all of its settings.

    Raises:
        UserError: TRL does not implement the loss.
    """
    if loss not in TRL_LOSS_TYPES:
        expected = f"with train.engine 'trl': {one_of(TRL_LOSS_TYPES)}"
        raise UserError(Problem("dpo.loss", f"'{loss}'", expected, NATIVE_ENGINE_REPAIR))
    if settings.get("length_normalized") is False:
        actual = f"'{loss}' with log-probabilities summed over tokens, as in the paper"
        expected = "with train.engine 'trl': averaged over tokens"
        repair = (
            f"dpo.loss={{name: {loss}, length_normalized: true, beta: ...}}, with beta per token; "
            f"or {NATIVE_ENGINE_REPAIR}"
        )
        raise UserError(Problem("dpo.loss", actual, expected, repair))
    shared_settings = {key: settings[key] for key in ("beta", "label_smoothing") if key in settings}
    return {"loss_type": [TRL_LOSS_TYPES[loss]], "loss_weights": None, **shared_settings}


class DPOSections(Protocol):
    """The section that the rules read."""

    dpo: DPOSettings


def _check_loss(settings: DPOSections) -> list[Problem]:
    return caught(_resolve_loss, settings.dpo)


def _check_trl_loss(settings: DPOSections) -> list[Problem]:
    # The problems of an invalid loss are those of `_check_loss`.
    if _check_loss(settings):
        return []
    return caught(trl_loss_arguments, *_resolve_loss(settings.dpo))


def _resolve_loss(dpo: DPOSettings) -> tuple[str, Mapping[str, Setting]]:
    loss = find_loss(dpo.loss_name, where="dpo.loss")
    return loss.name, loss.settings(dpo.loss_settings, where="dpo.loss")


RULES = (
    Rule(
        "dpo-loss",
        message="dpo.loss is a known loss with valid settings",
        source="align/preference/losses",
        find=_check_loss,
        reads=("dpo",),
    ),
    PREFERENCE_SELECT,
    PROMPT_LENGTH,
    PREFERENCE_NEFTUNE,
    Rule(
        "dpo-label-smoothing",
        {"train.label_smoothing": bool},
        source="arXiv 2305.18290, equation 7: no token labels",
        problem=Problem(
            "train.label_smoothing",
            "{train.label_smoothing:g}",
            "0: preference losses compare completions and have no token labels to smooth",
            "dpo.loss={{name: cdpo, label_smoothing: {train.label_smoothing:g}}} for noisy labels",
        ),
    ),
    Rule(
        "dpo-packing",
        {"data.packing": (True,)},
        source="align/preference/groups.py",
        problem=Problem(
            "data.packing",
            "true",
            "false: a prompt and its completions already share a row, and rows are filled with groups",
            "data.packing=false",
        ),
    ),
    Rule(
        "live-reference-full",
        {"dpo.reference": ("live",), "traits.full_finetuning": (True,)},
        source="align/preference/reference_policy.py",
        problem=Problem(
            "dpo.reference",
            "'live' with adapter.method '{adapter.method}'",
            "precomputed: a live reference would keep a second copy of the model in memory",
            "dpo.reference=precomputed",
        ),
    ),
    Rule(
        "chosen-logp-stop",
        {"dpo.max_chosen_logp_drop": is_set, "train.evaluate_every": (None,)},
        "the early stop needs held-out evaluations during training",
        source="align/dpo/trainer.py",
        problem=Problem(
            "dpo.max_chosen_logp_drop",
            "{dpo.max_chosen_logp_drop:g}, but train.evaluate_every is null",
            "held-out evaluations during training",
            "train.evaluate_every=50",
        ),
    ),
    Rule(
        "live-reference-trl",
        {"dpo.reference": ("live",), "train.engine": ("trl",)},
        "with TRL's trainer, the reference log-probabilities are precomputed",
        source="trl 1.16, trainer/dpo_trainer.py: precompute_ref_log_probs",
        problem=Problem(
            "dpo.reference",
            "'live'",
            "with train.engine 'trl': precomputed",
            f"dpo.reference=precomputed, or {NATIVE_ENGINE_REPAIR}",
        ),
    ),
    Rule(
        "trl-loss",
        {"train.engine": ("trl",)},
        message="TRL implements the same loss",
        source="trl 1.16, trainer/dpo_config.py: loss_type",
        find=_check_trl_loss,
        reads=("dpo", "train"),
    ),
    TRL_REFERENCE,
    CONSISTENCY,
)
