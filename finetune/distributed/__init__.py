"""Several processes: ranks, collectives, sharded weights, strategies and the launcher."""
