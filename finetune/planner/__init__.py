"""Memory, time and disk planning from shapes alone."""
