"""One module per stage, with its `Settings` and its `run`."""
