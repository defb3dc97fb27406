"""What people prefer: rows of it, the losses that learn from it, and their metrics."""
