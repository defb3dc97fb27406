"""What the libraries print while they are imported and used: in a program of ours, and in a user's."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

OURS = """
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
USERS = """
import importlib.util, logging, sys, warnings
from align import load_recipe, run

rows = [{{"instruction": f"Add {{i}} and {{i}}.", "output": str(2 * i)}} for i in range(12)]
settings = {{"model.precision": "float32", "data.held_out": 2, "data.max_length": 128, "data.cache": False,
  "train.max_steps": 1, "train.batch_size": 4, "evaluate.samples": 1, "evaluate.max_new_tokens": 4}}
result = run(load_recipe(base="{base}", data=rows, out="{out}", settings=settings))
model, tokenizer = result.load()
import bitsandbytes, peft, transformers
if importlib.util.find_spec("deepspeed") is not None:
    import deepspeed
for stream in (sys.stdout, sys.stderr):
    print("--- the user's own part", file=stream, flush=True)
for name in ("transformers", "transformers.trainer_utils", "peft", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(name).warning("a warning of %s", name)
warnings.warn("a change in transformers", FutureWarning)
if "deepspeed" in sys.modules:
    logging.getLogger("DeepSpeed").warning("a warning of DeepSpeed")
"""


def run_program(text: str) -> tuple[list[str], list[str]]:
    """Return the lines of standard output and standard error of a program."""
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr.splitlines()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_a_program_of_ours_prints_errors_alone() -> None:
    lines, errors = run_program(OURS)
    assert len(lines) == 1 and lines[0].endswith("an error")
    assert errors == ["[transformers] an error of transformers"]


def test_a_user_s_program_prints_no_foreign_line_and_all_later_warnings(
    base_folder: Path, tmp_path: Path
) -> None:
    lines, errors = run_program(USERS.format(base=base_folder, out=tmp_path / "run"))
    own_lines, own_errors = (part.index("--- the user's own part") for part in (lines, errors))
    assert errors[:own_errors] == []
    assert own_lines > 10 and [line for line in lines[:own_lines] if "WARNING" in line] == []
    expected = ["transformers", "trainer_utils", "peft", "cpu.ops", "FutureWarning"]
    shown = errors[own_errors + 1 :]
    assert all(any(name in line for line in shown) for name in expected), shown
    assert ["a warning of DeepSpeed" in line for line in lines[own_lines + 1 :]] in ([], [True])
