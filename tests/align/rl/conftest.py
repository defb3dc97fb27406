"""Puts the small tokenizers, models and bases of other tests on the import path."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
sys.path += [str(TESTS / "finetune" / room) for room in ("data", "adapters", "training")]
