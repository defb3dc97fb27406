"""Model, loss, trainer, checkpoints and the run directory."""
