"""Import path of the data tests' small tokenizers and the adapter tests' toy models."""

import sys
from pathlib import Path

FINETUNE = Path(__file__).parents[2] / "finetune"
sys.path += [str(FINETUNE / "data"), str(FINETUNE / "adapters")]
