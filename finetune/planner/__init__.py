"""Memory, time and disk of a run from shapes alone; ``estimate.py`` is the one module that others import."""
