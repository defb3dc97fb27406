"""Reward model metrics of the report: curves and before/after values."""

from align.reward.diagnostics import reward_diagnostics
from align.reward.settings import Settings
from finetune.recipe.settings import StageSettings
from finetune.training.metric_specs import MetricSpec

REWARD_CURVES = {
    "loss": "training loss (nats per comparison)",
    "accuracy": "accuracy (fraction of comparisons ranked correctly)",
    "margin": "reward margin (better minus worse)",
    "mean_reward": "mean reward",
    "held_out_loss": "held-out loss",
    "held_out_accuracy": "held-out accuracy",
    "held_out_margin": "held-out margin",
}


def reward_metric_spec(settings: StageSettings) -> MetricSpec:
    """Return the curves and values to show for these heads."""
    assert isinstance(settings, Settings)
    summary = {
        "held_out_accuracy": ("held-out accuracy", ".1%"),
        "held_out_loss": ("held-out loss", ".3f"),
        "held_out_margin": ("held-out margin", ".2f"),
    }
    heads = settings.reward.heads if len(settings.reward.heads) > 1 else []
    summary |= {f"held_out_accuracy_{name}": (f"held-out accuracy, {name}", ".1%") for name in heads}
    return MetricSpec(curves=REWARD_CURVES, summary=summary, diagnostics=reward_diagnostics)
