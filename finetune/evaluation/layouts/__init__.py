"""Layouts of published benchmarks: ``read_row``, and optionally METRICS and ``item_values``, one file each."""
