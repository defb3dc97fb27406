"""Preference data: published layouts -> comparisons -> token ids."""
