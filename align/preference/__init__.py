"""Preference learning: data rows, batches with shared prompts, log-probabilities, losses."""
