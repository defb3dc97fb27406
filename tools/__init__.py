"""Programs of developers; not in the wheel."""
