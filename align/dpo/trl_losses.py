"""Which of our losses TRL's DPOTrainer has, in its names; light, because a recipe is checked with it."""

from collections.abc import Mapping
from typing import Any

from align.preference.losses.catalogue import Setting
from finetune.recipe.errors import Problem, UserError, one_of

SAME = {
    "dpo": "sigmoid",
    "robust": "robust",
    "ipo": "ipo",
    "hinge": "hinge",
    "exo": "exo_pair",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}
"""Our losses: TRL's. Its `sigmoid` has no label smoothing, so there is no cDPO; its likelihood is the mean
over all tokens of a pass and not over pairs, so there is no RPO."""
NATIVE = "train.engine=native"


def trl_loss(loss: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the arguments of TRL's DPOConfig for a loss of the catalogue.

    Args:
        loss: its name.
        settings: all of its settings.

    Raises:
        UserError: TRL has no such loss.
    """
    if loss not in SAME:
        expected = f"with train.engine 'trl': {one_of(SAME)}"
        raise UserError(Problem("align.loss", f"'{loss}'", expected, NATIVE))
    if settings.get("over_tokens") == "sum":
        found = f"'{loss}' summed over tokens, as the paper prints it"
        expected = "with train.engine 'trl': the mean over tokens"
        repair = (
            f"align.loss={{name: {loss}, over_tokens: mean, beta: ...}}, where beta is per token; or {NATIVE}"
        )
        raise UserError(Problem("align.loss", found, expected, repair))
    own = {key: settings[key] for key in ("beta", "label_smoothing") if key in settings}
    return {"loss_type": [SAME[loss]], "loss_weights": None, **own}
