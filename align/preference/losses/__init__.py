"""The losses, pure functions, and their catalogue."""
