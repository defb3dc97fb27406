"""Learning from preferences: rows of them, a prompt and its completions in one sequence, losses."""
