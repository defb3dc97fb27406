"""Learning from preferences: a prompt and its completions in one sequence."""
