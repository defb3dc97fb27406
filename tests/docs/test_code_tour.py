"""Files, names and excerpts of code on the pages exist: a rename must reach the documentation."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
TOUR = DOCS / "code-tour.md"
PICTURE = DOCS / "pictures" / "recipe-path.svg"
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {
    "build",
    "runs",
}
SUFFIXES = (".py", ".yaml", ".json", ".md", ".svg", ".ipynb", "/")
"""Endings of inline code that names a file or a folder of the repository."""
DEFINED_IN = re.compile(r"`([\w/]+\.py)` · (`[\w.]+`(?:, `[\w.]+`)*)")
"""``path/to/file.py`` · ``name``, ``Class.method``: the file defines each of them."""
EXCERPT = re.compile(r'^```python title="([^"]+/[^"]+\.py)"\n(.*?)^```$', re.M | re.S)
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.M | re.S)


def files_named_in(text: str) -> set[str]:
    """Return the files and folders of the repository that a page names in inline code."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    paths = {code for code in re.findall(r"`([\w/.*-]+)`", prose) if code.endswith(SUFFIXES) and "/" in code}
    return {path for path in paths if path.split("/")[0] in FOLDERS and not re.search(r"\b[A-Z]{3,}\b", path)}


def names_defined_in(file: Path) -> set[str]:
    """Return a file's functions and classes, and ``Class.method`` of the latter."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def missing_names(text: str) -> list[str]:
    """Return the names of a page that their files do not define."""
    missing = []
    for path, names in DEFINED_IN.findall(text):
        defined = names_defined_in(ROOT / path)
        missing += [f"{path} · {name}" for name in re.findall(r"`([\w.]+)`", names) if name not in defined]
    return missing


def foreign_lines(excerpt: str, source: str) -> list[str]:
    """Return the lines of an excerpt that are not in the source in this order; ``...`` is an omission."""
    remaining = iter([line.strip() for line in source.splitlines()])
    lines = [line.strip() for line in excerpt.splitlines() if line.strip() not in ("", "...")]
    return [line for line in lines if line not in remaining]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_exist(page: Path) -> None:
    named = files_named_in(page.read_text(encoding="utf-8"))
    assert [path for path in sorted(named) if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_functions_and_classes_exist(page: Path) -> None:
    assert missing_names(page.read_text(encoding="utf-8")) == []


def test_the_tour_names_files_and_functions() -> None:
    text = TOUR.read_text(encoding="utf-8")
    assert len(files_named_in(text)) > 80
    assert sum(len(names.split(",")) for _, names in DEFINED_IN.findall(text)) > 80


def test_a_renamed_function_and_a_moved_file_are_found() -> None:
    assert missing_names("`align/dpo/trainer.py` · `forward_losses`, `old_name`") == [
        "align/dpo/trainer.py · old_name"
    ]
    assert missing_names("`align/dpo/trainer.py` · `PreferenceTrainer.log`, `PreferenceTrainer.old`") == [
        "align/dpo/trainer.py · PreferenceTrainer.old"
    ]
    assert files_named_in("`align/dpo/nothing.py` `judge.py` `recipes/STAGE/NAME.yaml` `runs/`") == {
        "align/dpo/nothing.py"
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_excerpts_are_the_code(page: Path) -> None:
    for path, excerpt in EXCERPT.findall(page.read_text(encoding="utf-8")):
        compile(excerpt, str(page), "exec")
        assert foreign_lines(excerpt, (ROOT / path).read_text(encoding="utf-8")) == [], path


def test_the_tour_has_excerpts() -> None:
    assert len(EXCERPT.findall(TOUR.read_text(encoding="utf-8"))) >= 8


def test_an_edited_excerpt_is_found() -> None:
    assert foreign_lines("a = 1\n...\nc = 3\n", "a = 1\nb = 2\nc = 3\n") == []
    assert foreign_lines("c = 3\na = 1\n", "a = 1\nb = 2\nc = 3\n") == ["a = 1"]


def test_the_example_prints_what_the_page_shows() -> None:
    code, output = EXAMPLE.findall(TOUR.read_text(encoding="utf-8"))[0]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout == output


def test_files_of_the_picture_exist() -> None:
    paths: list[Path] = []
    for line in re.findall(r'class="code"[^>]*>([^<]*·[^<]*)<', PICTURE.read_text(encoding="utf-8")):
        for name in line.split(" · "):
            # A bare name is in the folder of the file before it.
            paths.append(ROOT / name if "/" in name.rstrip("/") else paths[-1].parent / name)
    assert len(paths) >= 12
    assert [str(path) for path in paths if not path.exists()] == []
    assert PICTURE.stat().st_size < 20_000
