"""Preference data is encoded with the same small tokenizers as other data."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "finetune" / "data"))
