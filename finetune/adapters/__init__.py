"""Adapters (PEFT methods), one file each: the file's name is its name in `adapter.method`."""
