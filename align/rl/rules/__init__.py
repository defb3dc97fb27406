"""Reward functions that ship with the package; any of them can be named in ``rewards.sources``."""
