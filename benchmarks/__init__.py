"""Benchmarks against TRL: the same work in one run, reported as ratios."""
