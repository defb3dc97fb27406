"""Rejection sampling (best-of-n): sample completions, score them, fine-tune on the best."""
