"""Generation: samplers of completions, and log-probabilities of fixed labels."""
