"""Verdict on two evaluations, and comparison of finished runs."""
