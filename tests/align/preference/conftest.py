"""The small tokenizers of the data's tests and the toy bases of the adapters' serve here too."""

import sys
from pathlib import Path

FINETUNE = Path(__file__).parents[2] / "finetune"
sys.path += [str(FINETUNE / "data"), str(FINETUNE / "adapters")]
