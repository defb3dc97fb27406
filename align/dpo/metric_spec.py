"""Metrics of a DPO run: labels of the curves, and of the summary before and after training."""

from finetune.training.metric_specs import MetricSpec

DPO_CURVES = {
    "loss": "training loss (mean per group)",
    "rewards/margins": "implicit reward margin",
    "rewards/accuracies": "reward accuracy (tie: 1/2)",
    "logps/chosen": "chosen log-probability (nats per token)",
    "logps/rejected": "rejected log-probability (nats per token)",
    "logratios/chosen": "chosen log-ratio to the reference (nats per token)",
    "logratios/rejected": "rejected log-ratio to the reference (nats per token)",
    "objective/kl_per_token": "KL to the reference (k2 on the data, nats per token)",
    "data/length_ratio": "chosen/rejected length ratio",
}
HELD_OUT_CURVES = {f"eval/{name}": f"held-out {title}" for name, title in DPO_CURVES.items()}

DPO_METRIC_SPEC = MetricSpec(
    curves={**DPO_CURVES, **HELD_OUT_CURVES},
    summary={
        "loss": ("training loss", ".4f"),
        "eval/loss": ("held-out loss", ".4f"),
        "eval/rewards/accuracies": ("held-out accuracy", ".1%"),
        "eval/rewards/margins": ("held-out margin", ".3f"),
        "eval/logps/chosen": ("held-out chosen log-probability per token", ".3f"),
        "eval/logps/rejected": ("held-out rejected log-probability per token", ".3f"),
    },
)
