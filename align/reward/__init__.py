"""Reward models: scores learnt from comparisons, rules beside them, and what is measured of both."""
