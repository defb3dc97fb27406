"""TRL's names of our losses (DPOConfig.loss_type); imports no TRL, because recipe validation reads it."""

from collections.abc import Mapping
from typing import Any

from align.preference.losses.catalog import Setting
from finetune.recipe.errors import Problem, UserError, one_of

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
