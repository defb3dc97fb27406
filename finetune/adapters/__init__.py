"""Adapters (PEFT methods), one file each: the file's name is its name in `adapter.method`."""

SHARED = ("traits",)
"""Modules of this folder that are not adapters."""
