"""Import path of the adapter tests' toy models and the preference tests' helpers."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
sys.path += [
    str(TESTS / "finetune" / "data"),
    str(TESTS / "finetune" / "adapters"),
    str(TESTS / "align" / "preference"),
]
