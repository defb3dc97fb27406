"""The Makefile's benchmark targets take the options that the benchmarks' pages name."""

import re
from pathlib import Path

MAKEFILE = Path(__file__).parents[2] / "Makefile"


def test_every_benchmark_target_passes_its_arguments() -> None:
    commands = re.findall(r"python -m benchmarks\..*", MAKEFILE.read_text(encoding="utf-8"))
    assert len(commands) == 1 and all(command.endswith(" $(ARGS)") for command in commands), commands
