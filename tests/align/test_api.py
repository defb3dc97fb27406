"""The Python API agrees with the command line."""

import sys
from pathlib import Path

import pytest
from api_settings import ADDITIONS as ROWS
from api_settings import FAST

from align import load_recipe, run
from align.cli import main
from finetune.recipe.errors import UserError


def test_rows_from_python_are_trained_and_summarized(base_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(base=str(base_folder), data=ROWS, out=tmp_path / "run", settings=FAST)
    assert recipe.origins["train.max_steps"] == "command line"
    result = run(recipe)
    assert result.directory == tmp_path / "run" and result.adapter.name == "adapter"
    assert result.record["status"] == "finished" and result.record["data"]["rows"] == 10
    assert [entry["step"] for entry in result.metrics if "loss" in entry] == [1, 2]
    assert result.samples[0]["expected"] in {row["output"] for row in ROWS}
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "source: rows/data.source.jsonl" in written and "Add 3 and 3." not in written


def test_other_rows_are_another_run(base_folder: Path, tmp_path: Path) -> None:
    run(load_recipe(base=str(base_folder), data=ROWS, out=tmp_path / "run", settings=FAST))
    other = load_recipe(base=str(base_folder), data=ROWS[1:], out=tmp_path / "run", settings=FAST)
    with pytest.raises(UserError, match="a run with other settings or data"):
        run(other)
    assert run(other, force=True).record["data"]["rows"] == 9


def test_a_bad_row_is_named_by_its_number(base_folder: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"instruction": "a", "output": 7}]
    recipe = load_recipe(base=str(base_folder), data=rows, out=tmp_path / "run", settings=FAST)
    with pytest.raises(UserError, match=r"row 13: field 'output': found 7"):
        run(recipe)
    assert not (tmp_path / "run").exists()


def test_all_problems_at_once() -> None:
    with pytest.raises(UserError) as error:
        load_recipe(adapter="loras", data=ROWS, settings={"train.epoch": 1, "data.template": "none"})
    assert len(error.value.problems) == 3


def test_python_and_the_command_line_name_the_same_run(
    base_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(load_recipe(base=str(base_folder), data=str(rows_file), settings=FAST))
    words = [f"{key}={value}" for key, value in FAST.items()]
    command = ["llm-align", "sft", "--base", str(base_folder), "--data", str(rows_file), *words]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [result.directory.name]
