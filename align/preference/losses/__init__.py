"""Preference losses as pure functions, and their catalog."""
