"""Evaluation of runs and bases: suites, judges, the verdict, and comparisons of runs."""
