"""Trainers of other libraries, fed the same rendered data."""
