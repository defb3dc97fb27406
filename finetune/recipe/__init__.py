"""Recipes: YAML and command-line overrides to validated settings; all errors are reported at once."""
