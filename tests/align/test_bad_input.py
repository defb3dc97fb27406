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
def test_pain_24_a_mistake_is_told(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrange, fragments = CASES[name]
    command = arrange(place)
    before = contents(place.root)
    status = run(command, monkeypatch)
    told = capsys.readouterr()
    assert status == 2, told.err
    for fragment in fragments:
        assert fragment in told.err
    assert "Traceback" not in told.err + told.out
    assert told.err.startswith("llm-align: ")
    assert contents(place.root) == before


def test_the_recipe_that_the_cases_spoil_is_good(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_process_of_its_own_ends_with_status_2(place: Place, name: str) -> None:
    arrange, fragments = CASES[name]
    command = [sys.executable, "-m", "align", *arrange(place)]
    before = contents(place.root)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert all(fragment in ended.stderr for fragment in fragments)
    assert "Traceback" not in ended.stderr + ended.stdout
    assert contents(place.root) == before
