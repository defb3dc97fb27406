"""One file a stage: its `Settings` and its `run`."""
