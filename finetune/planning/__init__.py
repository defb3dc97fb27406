"""What a run will need, and what fits together; pure functions."""
