"""One file per stage: its `Settings` and its `run`."""
