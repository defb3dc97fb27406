"""Puts the small models of other tests on the import path."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
sys.path += [
    str(TESTS / "finetune" / "data"),
    str(TESTS / "finetune" / "adapters"),
    str(TESTS / "align" / "preference"),
    str(TESTS / "align" / "reward"),
    str(TESTS / "finetune" / "training"),
]
