"""Runs of the sft stage in a test's folder."""

from functools import partial
from pathlib import Path

import pytest
from gpu_runs import RunSFT, run_sft


@pytest.fixture
def sft(tmp_path: Path, base_folder: Path, rows_file: Path) -> RunSFT:
    """Return a function: a run's name and settings in, ``model__precision="float32"``; its result out."""
    return partial(run_sft, tmp_path, base_folder, rows_file)
