"""Every notebook runs from top to bottom, and its model has learnt what the notebook says."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_learns(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    before, after = re.search(r"exact match: (\d+)% before, (\d+)% after", printed).groups()
    assert int(before) <= 10
    assert int(after) >= 70
    assert (tmp_path / "runs" / "in-house" / "adapter" / "adapter_model.safetensors").is_file()
