"""A pipeline reads the rows of all stages before the first one starts; a broken stage is one problem."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align import cli, load_pipeline
from align.pipeline.plan import resolve_pipeline
from align.pipeline.runner import run_all_stages
from finetune.recipe.errors import UserError
from finetune.recipe.python_rows import PythonRows

PIPELINE = """stages:
  first: {recipe: sft/quickstart, set: {data.source: sft.jsonl, data.held_out: 0, evaluate.exact_match: 0}}
  taste: {recipe: reward/quickstart, from: first, set: {data.source: pairs.jsonl, data.held_out: 0}}
  last: {recipe: ppo/quickstart, from: first, reward: taste, set: {data.source: prompts.jsonl}}
"""
GOOD: dict[str, dict[str, Any]] = {
    "sft.jsonl": {"instruction": "Say hi.", "output": "hi"},
    "pairs.jsonl": {"prompt": "Say hi.", "chosen": "hi", "rejected": "no"},
    "prompts.jsonl": {"prompt": "Say hi."},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with a pipeline of three stages and their rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe.yaml").write_text(PIPELINE)
    for name, row in GOOD.items():
        write_rows(name, [{key: f"{value} {i}" for key, value in row.items()} for i in range(120)])
    return tmp_path


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["llm-align", "run", "pipe.yaml", "--dry-run", *words])
    try:
        cli.main()
    except SystemExit as exit_error:
        assert exit_error.code == 2
    return capsys.readouterr().err


def run_now() -> str:
    with pytest.raises(UserError) as error:
        run_all_stages(resolve_pipeline("pipe.yaml"), Console(quiet=True))
    return str(error.value)


BAD: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "no layout": ("pairs.jsonl", [{"question": "a"}], "stage taste: pairs.jsonl: "),
    "a number": (
        "pairs.jsonl",
        [{"prompt": "a", "chosen": 1, "rejected": "b"}],
        "stage taste: pairs.jsonl:1: ",
    ),
    "no reply": (
        "sft.jsonl",
        [{"instruction": "a", "output": ""}],
        "stage first: data.source: no row to train on",
    ),
    "no prompt": ("prompts.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}], "stage last: "),
    "no rows": ("prompts.jsonl", [], "stage last: prompts.jsonl: no rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_of_any_stage_stop_the_pipeline_first(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, rows, problem = BAD[name]
    write_rows(file, rows)
    told = dry_run(monkeypatch, capsys)
    assert told.startswith("llm-align: 1 problem\n") and problem in told
    assert problem in run_now() and not (folder / "runs").exists()


def test_all_stages_problems_come_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(monkeypatch, capsys) == ""
    write_rows("sft.jsonl", [{"instruction": 1, "output": "a"}])
    write_rows("prompts.jsonl", [{"prompt": 2}])
    for text in (run_now(), dry_run(monkeypatch, capsys)):
        assert "stage first: sft.jsonl:1: field 'instruction'" in text
        assert "stage last: prompts.jsonl:1: field 'prompt'" in text
    # With a problem of a recipe, too; what its run would give to the others is no problem of theirs.
    text = dry_run(monkeypatch, capsys, "taste.train.max_steps=x")
    assert text.startswith("llm-align: 3 problems") and text.count("stage last: ") == 1


FOLLOW_UPS: dict[str, tuple[list[str], list[str]]] = {
    "an override of the reward": (["taste.train.max_steps=x"], ["stage taste: train.max_steps"]),
    "an override of the parent": (["first.train.max_steps=x"], ["stage first: train.max_steps"]),
    "a key of the parent": (["first.train.nope=1"], ["stage first: train.nope"]),
    "the parent's adapter": (["first.adapter.method=nope"], ["stage first: adapter.method"]),
    "both": (["first.train.nope=1", "taste.train.nope=1"], ["stage first: ", "stage taste: "]),
    "its own as well": (["taste.train.nope=1", "last.ppo.nope=1"], ["stage taste: ", "stage last: ppo.nope"]),
    "its own adapter": (
        ["first.train.nope=1", "last.adapter.nope=1"],
        ["stage first: ", "stage last: adapter"],
    ),
    "its own model": (
        ["first.train.nope=1", "last.model.precision=x"],
        ["stage first: ", "stage last: model.p"],
    ),
}


@pytest.mark.parametrize("name", FOLLOW_UPS)
def test_a_broken_stage_is_one_problem(name: str, folder: Path) -> None:
    arguments, expected = FOLLOW_UPS[name]
    with pytest.raises(UserError) as error:
        resolve_pipeline("pipe.yaml", arguments=arguments)
    assert [
        problem.where[: len(start)] for problem, start in zip(error.value.problems, expected, strict=True)
    ] == expected


REFERENCES: dict[str, Callable[[str], str]] = {
    "an unknown reward": lambda text: text.replace("reward: taste", "reward: tast"),
    "an unknown parent": lambda text: text.replace("from: first, reward", "from: frist, reward"),
    "a policy as reward": lambda text: text.replace("reward: taste", "reward: first"),
    "a recipe that does not exist": lambda text: text.replace("reward/quickstart", "reward/nope"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_wrong_reference_is_one_problem(name: str, folder: Path) -> None:
    (folder / "pipe.yaml").write_text(REFERENCES[name](PIPELINE))
    with pytest.raises(UserError) as error:
        resolve_pipeline("pipe.yaml")
    assert len(error.value.problems) == 1, error.value


def test_rows_from_python_are_kept_for_the_stages(folder: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(8)]
    settings = {"first.data.source": iter(rows), "first.data.held_out": 0}
    pipeline = load_pipeline("pipe.yaml", settings=settings)
    entry = pipeline.entries[0]
    # A stage is loaded again before it runs, and a generator is read once.
    assert entry.overrides["data.source"] == PythonRows.of(rows)
    assert entry.load(init_from=None, rewards={}).settings.data.source == PythonRows.of(rows)
    assert "8 rows given in Python" in entry.command(init_from=None, rewards={})
    same = load_pipeline("pipe.yaml", settings={**settings, "first.data.source": rows})
    other = load_pipeline("pipe.yaml", settings={**settings, "first.data.source": rows[1:]})
    assert pipeline.digest == same.digest != other.digest
    stored = entry.with_stored_rows(folder).overrides["data.source"]
    assert stored == f"{folder}/rows/first.data.source.jsonl"
    assert [json.loads(line) for line in Path(stored).read_text().splitlines()] == rows
