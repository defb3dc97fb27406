"""What a reader of a preference run looks at: curves over the steps, numbers before and after."""

from finetune.training.watched import Watched

CURVES = {
    "loss": "training loss (mean over groups)",
    "margin": "margin of the implicit rewards",
    "accuracy": "accuracy: chosen above rejected (1/2: a tie)",
    "chosen_logps": "chosen: log-probability per token (nats)",
    "rejected_logps": "rejected: log-probability per token (nats)",
    "chosen_drift": "chosen: drift from the start per token (nats)",
    "rejected_drift": "rejected: drift from the start per token (nats)",
    "kl": "distance from the start per token (k2 on the data, nats)",
    "length_ratio": "chosen tokens for one rejected token",
}
HELD_OUT = {f"held_out_{name}": f"held-out {title}" for name, title in CURVES.items()}

WATCHED = Watched(
    curves={**CURVES, **HELD_OUT},
    numbers={
        "loss": ("training loss", ".4f"),
        "held_out_loss": ("held-out loss", ".4f"),
        "held_out_accuracy": ("held-out accuracy", ".1%"),
        "held_out_margin": ("held-out margin", ".3f"),
        "held_out_chosen_logps": ("held-out chosen, nats per token", ".3f"),
        "held_out_rejected_logps": ("held-out rejected, nats per token", ".3f"),
    },
)
