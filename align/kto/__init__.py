"""Kahneman-Tversky optimization (stage kto) on TRL's KTOTrainer."""
