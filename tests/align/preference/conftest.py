"""The toy bases and adapters of the property matrix serve here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "finetune" / "adapters"))
