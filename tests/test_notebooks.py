"""Every notebook runs from top to bottom, and its model learns what the notebook says."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    ("epochs", "lowest"),
    [(12, 15), pytest.param(30, 70, marks=pytest.mark.slow)],
    ids=["shortened", "as it is"],
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_learns(path: Path, epochs: int, lowest: int, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r'"train\.epochs": \d+', f'"train.epochs": {epochs}', cell.source)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    before, after = re.search(r"exact match: (\d+)% before, (\d+)% after", printed).groups()
    assert int(before) <= 3
    assert int(after) >= lowest
    assert (tmp_path / "runs" / "in-house" / "adapter" / "adapter_model.safetensors").is_file()
