"""The small tokenizers of the data's tests serve here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "finetune" / "data"))
