"""Adapt and align language models: ``from align import load_recipe, run``."""

from align.api import load_recipe, run

__all__ = ["load_recipe", "run"]
