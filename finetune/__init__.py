"""Layer 1: recipe to model and adapter to supervised tuning."""

__version__ = "0.1.0"
"""The version of llm-align."""
