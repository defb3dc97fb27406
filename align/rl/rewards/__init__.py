"""Rewards: finished reward models and Python functions, weighted and combined."""
