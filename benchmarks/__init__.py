"""Measurements against other programs: the same work, in one run, told as ratios."""
