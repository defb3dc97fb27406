"""Rows given in Python: their run has a copy, by which it is resumed, previewed, moved and continued."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from align import data, load_recipe, plan, run
from align.data_check import data_problems
from align.required_runs import plan_runs
from finetune.recipe.errors import UserError
from finetune.recipe.settings import ModelSettings
from finetune.training.fingerprint import run_fingerprint
from finetune.training.run_directory import RunDirectory
from finetune.training.stored_rows import row_sources, store_rows

ROWS = [{"instruction": f"{i} 더하기 {i}?", "output": str(2 * i), "meta": {"n": 2**80}} for i in range(12)]
FAST = {
    "model.precision": "float32",
    "data.held_out": 2,
    "data.max_length": 128,
    "train.max_steps": 2,
    "train.batch_size": 4,
    "evaluate.samples": 0,
    "evaluate.exact_match": 0,
}


def test_a_run_is_continued_by_its_own_copy(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = str(base_folder)
    result = run(load_recipe("sft/alpaca", base=base, data=iter(ROWS), settings=FAST))
    folder = result.directory
    assert [file.name for file in (folder / "rows").iterdir()] == ["data.source.jsonl"]
    assert "source: rows/data.source.jsonl" in (folder / "recipe.yaml").read_text()
    lines = (folder / "rows" / "data.source.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS and "더하기" in lines[0]
    # The same rows as another table: the finished run is returned.
    again = run(load_recipe("alpaca", base=base, data=pandas.DataFrame(ROWS), settings=FAST))
    assert (again.directory, again.record) == (folder, result.record)
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(folder, moved)
    for name in (str(moved), str(moved / "recipe.yaml")):
        recipe = load_recipe(name)
        assert (recipe.stage, recipe.name) == ("sft", "alpaca")
        assert run(recipe).directory == moved
        [planned] = plan_runs(recipe, force=False)
        assert (planned.path, planned.status) == (moved, "finished")
    assert data(recipe, rows=1)["shown"][0]["where"].startswith(f"{moved}/rows/data.source.jsonl:")
    assert plan(recipe).lengths.rows == 10
    # An interrupted run: same folder. A changed setting: another run, of the recipe's name.
    record = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    assert RunDirectory.of(load_recipe(str(moved)), force=False).path == moved
    other = RunDirectory.of(load_recipe(str(moved), settings={"train.seed": 1}), force=False)
    assert other.path.name.startswith("sft-alpaca-") and not other.record
    # Starting over reads the copy, which must not be deleted before.
    fresh = run(load_recipe(str(moved)), force=True)
    assert fresh.directory == moved and fresh.record["data"]["rows"] == 10
    assert (moved / "rows" / "data.source.jsonl").read_text(encoding="utf-8").splitlines() == lines


PAIR = {"prompt": "Say hi.", "chosen": "hi", "rejected": "no"}
STAGES: dict[str, dict[str, Any]] = {
    "dpo": PAIR,
    "reward": PAIR,
    "chain_of_hindsight": PAIR,
    "kto": {"prompt": "Say hi.", "completion": "hi", "label": True},
    "ppo": {"prompt": "Say hi."},
    "grpo": {"prompt": "Say hi."},
    "rejection": {"prompt": "Say hi."},
    "pretrain": {"text": "A text. " * 20},
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_rows(stage: str) -> None:
    row, settings = STAGES[stage], {"data.held_out": 0, **_without_held_out(stage)}
    label = {"label": True} if "label" in row else {}
    rows = [{key: f"{value} {number}" for key, value in row.items()} | label for number in range(8)]
    recipe = load_recipe(stage, data=rows, settings=settings)
    assert data_problems(recipe) == []
    assert "rows given in Python" in plan(recipe).lengths.basis
    assert "row 1" in data(recipe, rows=1)["shown"][0]["where"]
    bad = load_recipe(stage, data=[*rows, dict.fromkeys(row, 7)], settings=settings)
    [problem] = data_problems(bad, dry_run=True)
    assert problem.where == "row 9" and "found 7" in problem.actual


def _without_held_out(stage: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "evaluate.exact_match": 0,
        "train.evaluate_every": None,
        "evaluate.graders": {},
    }
    return settings | ({"stop.max_gold_drop": None} if stage == "ppo" else {})


EXTRA = [{"instruction": "Say hi.", "output": "hi"}]
KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    "data.held_out": ("sft", {"data.held_out": EXTRA}),
    "data.mix[0].source": ("sft", {"data.mix": [{"source": EXTRA, "weight": 2}]}),
    "evaluate.retention": ("sft", {"evaluate.retention": EXTRA}),
    "pretraining.source": ("ppo", {"pretraining.source": EXTRA, "pretraining.weight": 1.0}),
}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_rows_is_stored_and_named_by_its_contents(key: str, tmp_path: Path) -> None:
    stage, settings = KEYS[key]
    recipe = load_recipe(stage, settings=settings)
    (tmp_path / "run.json").write_text("{}")
    stored = store_rows(recipe.settings, tmp_path)
    name = f"rows/{key.replace('[0]', '-0')}.jsonl"
    assert dict(row_sources(stored))[key] == name and json.loads((tmp_path / name).read_text()) == EXTRA[0]
    # Read from the copy, the run has the same name; with other rows another one.
    by_copy = load_recipe(stage, settings=_with_value(settings, str(tmp_path / name)))
    by_others = load_recipe(stage, settings=_with_value(settings, [*EXTRA, {**EXTRA[0], "output": "ho"}]))
    digests = [_digest(recipe) for recipe in (recipe, by_copy, by_others)]
    assert digests[0] == digests[1] != digests[2]
    # Stored again, the copy stays, and what is no longer named goes.
    assert store_rows(by_copy.settings, tmp_path) == stored
    store_rows(load_recipe(stage).settings, tmp_path)
    assert list((tmp_path / "rows").iterdir()) == []


def _with_value(settings: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {
        key: [{**value[0], "source": rows}] if key == "data.mix" else rows if value is EXTRA else value
        for key, value in settings.items()
    }


def _digest(recipe: Any) -> str:
    settings = recipe.settings.model_copy(update={"model": ModelSettings()})
    sections = dict(settings)
    if "rewards" in sections:  # the runs need not exist for the rows' digest
        rewards = sections["rewards"].model_copy(update={"sources": []})
        settings = settings.model_copy(update={"rewards": rewards})
    return str(recipe.digest(run_fingerprint(settings)))


MISSING = [
    ("a table", lambda rows, path: pandas.DataFrame(rows)),
    ("a file", lambda rows, path: _csv(pandas.DataFrame(rows), path)),
    ("a frame of the file", lambda rows, path: pandas.read_csv(_csv(pandas.DataFrame(rows), path))),
]


def _csv(frame: pandas.DataFrame, path: Path) -> Path:
    frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("form", [form for _, form in MISSING], ids=[name for name, _ in MISSING])
def test_a_missing_cell_of_a_frame_is_an_empty_cell_of_a_file(
    form: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [{"instruction": "Say hi.", "input": None, "output": "hi"}]
    rows += [{"instruction": "Repeat.", "input": "ho", "output": "ho"}]
    table = form(rows, tmp_path / "a.csv")
    recipe = load_recipe("alpaca", base="tiny", data=table, settings={"data.held_out": 0})
    shown = data(recipe, rows=2)["shown"]
    assert len(shown) == 2 and "### Input" not in "".join(piece["text"] for piece in shown[0]["pieces"])


def test_an_empty_table_has_no_rows() -> None:
    with pytest.raises(UserError, match="data.source: no rows"):
        data(load_recipe("alpaca", base="tiny", data=pandas.DataFrame({"instruction": [], "output": []})))
