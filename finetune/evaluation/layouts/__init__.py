"""Layouts of published benchmarks, one file each: ``read_row``, optionally METRICS and ``item_values``."""
