"""Metrics of a DPO run: labels of the curves, and of the summary before and after training."""

from finetune.training.metric_specs import MetricSpec

DPO_CURVES = {
    "loss": "training loss (mean per group)",
    "margin": "implicit reward margin",
    "accuracy": "reward accuracy (tie: 1/2)",
    "chosen_logps": "chosen log-probability (nats per token)",
    "rejected_logps": "rejected log-probability (nats per token)",
    "chosen_drift": "chosen log-ratio to the reference (nats per token)",
    "rejected_drift": "rejected log-ratio to the reference (nats per token)",
    "kl": "KL to the reference (k2 on the data, nats per token)",
    "length_ratio": "chosen/rejected length ratio",
}
HELD_OUT_CURVES = {f"held_out_{name}": f"held-out {title}" for name, title in DPO_CURVES.items()}

DPO_METRIC_SPEC = MetricSpec(
    curves={**DPO_CURVES, **HELD_OUT_CURVES},
    summary={
        "loss": ("training loss", ".4f"),
        "held_out_loss": ("held-out loss", ".4f"),
        "held_out_accuracy": ("held-out accuracy", ".1%"),
        "held_out_margin": ("held-out margin", ".3f"),
        "held_out_chosen_logps": ("held-out chosen log-probability per token", ".3f"),
        "held_out_rejected_logps": ("held-out rejected log-probability per token", ".3f"),
    },
)
