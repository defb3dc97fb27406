"""Direct preference optimization (stage dpo): trainer, reference log-probabilities, checks, diagnostics."""
