"""Rewards that are programs: each file's functions can be named as ``reward.sources``."""
