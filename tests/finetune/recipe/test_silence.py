"""What the libraries print while they are imported."""

import importlib.util
import subprocess
import sys

import pytest

PROGRAM = """
from finetune.recipe.silence import silence_libraries
silence_libraries()
silence_libraries()
import accelerate.utils.deepspeed, transformers.trainer_utils
from deepspeed.utils import logger
logger.warning("a warning")
logger.error("an error")
transformers.trainer_utils.logger.warning("a warning")
transformers.trainer_utils.logger.error("an error of transformers")
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_only_errors_are_printed() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 1 and lines[0].endswith("an error")
    assert result.stderr.splitlines() == ["[transformers] an error of transformers"]
