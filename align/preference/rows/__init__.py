"""Preference data: published layouts to comparisons, and to token ids."""
