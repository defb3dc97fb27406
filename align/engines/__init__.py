"""Engines of the alignment stages other than our own trainers."""
