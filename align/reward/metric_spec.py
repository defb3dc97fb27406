"""Reward model metrics of the report: curves and before/after values."""

from align.reward.diagnostics import reward_diagnostics
from align.reward.settings import Settings
from finetune.recipe.settings import StageSettings
from finetune.training.metric_specs import MetricSpec

REWARD_CURVES = {
    "loss": "training loss (nats per comparison)",
    "rewards/accuracies": "accuracy (fraction of comparisons ranked correctly)",
    "rewards/margins": "reward margin (better minus worse)",
    "rewards/mean": "mean reward",
    "eval/loss": "held-out loss",
    "eval/rewards/accuracies": "held-out accuracy",
    "eval/rewards/margins": "held-out margin",
}


def reward_metric_spec(settings: StageSettings) -> MetricSpec:
    """Return the curves and values to show for these heads."""
    assert isinstance(settings, Settings)
    summary = {
        "eval/rewards/accuracies": ("held-out accuracy", ".1%"),
        "eval/loss": ("held-out loss", ".3f"),
        "eval/rewards/margins": ("held-out margin", ".2f"),
    }
    heads = settings.reward.heads if len(settings.reward.heads) > 1 else []
    summary |= {f"eval/rewards/accuracies/{name}": (f"held-out accuracy, {name}", ".1%") for name in heads}
    return MetricSpec(curves=REWARD_CURVES, summary=summary, diagnostics=reward_diagnostics)
