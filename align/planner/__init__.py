"""Plans of recipes: memory, steps, tokens, time and disk, before anything is loaded."""
