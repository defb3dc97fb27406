"""Evaluation: statistics, and metrics of classification. Pure functions over arrays."""
