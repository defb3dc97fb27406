"""Layer 1: recipe to model and adapter to supervised tuning."""
