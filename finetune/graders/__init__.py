"""Graders of completions, one file each: recipes name them by the file's name, such as ``number``.

A file has a function of its own name, whose parameters are filled by name as those of user functions,
and optionally Options, which suites set.
"""

SHARED = ("loading", "stories")
"""Not graders: the loader, and functions that recipes name by their path."""
