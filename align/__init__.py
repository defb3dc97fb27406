"""Adapt and align language models: ``from align import load_recipe, load_tuned, run``."""

from align.api import load_recipe, load_tuned, run

__all__ = ["load_recipe", "load_tuned", "run"]
