"""Every user error is reported with exit status 2, and nothing is written or overwritten."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from bad_cases import CASES
from bad_input import RECIPE, ROWS, Place

from align import cli


@pytest.fixture
def place(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(RECIPE)
    (tmp_path / "base").symlink_to(base_folder)
    place = Place(tmp_path, base_folder)
    place.rows(*ROWS, name="rows.jsonl")
    return place


def contents(folder: Path) -> dict[str, str]:
    """Return every file and folder with a checksum of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["llm-align", *command])
    with pytest.raises(SystemExit) as end:
        cli.main()
        raise SystemExit(0)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("name", CASES)
def test_pain_24_user_errors_are_reported(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrange, fragments = CASES[name]
    command = arrange(place)
    before = contents(place.root)
    status = run(command, monkeypatch)
    captured = capsys.readouterr()
    assert status == 2, captured.err
    for fragment in fragments:
        assert fragment in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.startswith("llm-align: ")
    assert contents(place.root) == before


def test_the_unmodified_recipe_is_valid(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["sft", "good.yaml", "--out", "run"], monkeypatch) == 0
    assert (place.root / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "name",
    [
        "unknown key",
        pytest.param("data: wrong columns", marks=pytest.mark.slow),
        pytest.param("base: damaged weights", marks=pytest.mark.slow),
    ],
)
def test_a_separate_process_exits_with_2(place: Place, name: str) -> None:
    arrange, fragments = CASES[name]
    command = [sys.executable, "-m", "align", *arrange(place)]
    before = contents(place.root)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert all(fragment in result.stderr for fragment in fragments)
    assert "Traceback" not in result.stderr + result.stdout
    assert contents(place.root) == before
