"""A folder with small recipes of three stages and a pipeline of them, and the command line in it."""

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_pipelines import Call, write_recipes

from align import cli, load_pipeline, run_pipeline

Figures = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture
def here(tmp_path: Path, base_folder: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with recipes ``small`` of stages sft, reward and dpo, and a pipeline ``three``."""
    write_recipes(tmp_path, base_folder, rows_file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path, rows_file: Path, figures: Figures
) -> Path:
    """Return a folder in which ``three`` has run to its end, for tests to copy."""
    folder = tmp_path_factory.mktemp("finished")
    write_recipes(folder, base_folder, rows_file)
    with contextlib.chdir(folder), figures():  # in this process: killed pipelines have another hash seed
        run_pipeline(load_pipeline("three"), command="llm-align run three")
    return folder


@pytest.fixture
def done(here: Path, finished: Path) -> Path:
    """Return the test's folder with a finished pipeline ``three``."""
    shutil.copytree(finished / "runs", here / "runs")
    return here


@pytest.fixture
def call(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function: words in, exit status, output and errors out; in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llm-align", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
