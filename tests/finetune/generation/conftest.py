"""The toy models of the adapters' and of the training's tests."""

import sys
from pathlib import Path

FINETUNE = Path(__file__).parents[1]
sys.path += [str(FINETUNE / "training"), str(FINETUNE / "adapters")]
