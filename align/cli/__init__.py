"""The command line ``llm-align``."""

from align.cli.commands import cli, main

__all__ = ["cli", "main"]
