"""Memory, time and disk planning from shapes alone, and the compatibility rules of settings."""
