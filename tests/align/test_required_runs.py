"""``--from`` as a user meets it: a run by its name, and a recipe whose run comes first."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm

from align import cli, load_recipe, load_tuned, run
from finetune.training import fit

RECIPE = """\
stage: sft
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 6, max_length: 128, template: alpaca}}
adapter: {{method: lora, rank: 2}}
train: {{max_steps: 2, batch_size: 8, learning_rate: 1e-2}}
evaluate: {{samples: 1, max_new_tokens: 4}}
"""
SECOND = """\
model: {{init_from: sft/first}}
data: {{source: {rows}, held_out: 6, max_length: 128}}
train: {{max_steps: 2, batch_size: 8, learning_rate: 1e-2}}
evaluate: {{samples: 1, max_new_tokens: 4}}
"""
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, base_folder: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {"first": RECIPE, "second": SECOND}.items():
        path = tmp_path / "recipes" / "sft" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(base=base_folder, rows=rows_file))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function: words in, exit status, output and errors out; in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llm-align", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def records(here: Path) -> dict[str, dict]:
    run_records = [json.loads(file.read_text()) for file in (here / "runs").glob("*/run.json")]
    return {record["recipe"]: record for record in run_records}


def test_the_run_of_another_recipe_comes_first(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("show", "second")[0] == 0 and not (here / "runs").exists(), "showing runs nothing"
    status, out, err = call("sft", "second")
    assert status == 0, err
    run_records = records(here)
    first = f"runs/sft-first-{run_records['first']['digest']}"
    assert f"starts from sft/first, which has no finished run; running it first ({first})\n" in out
    assert f"{first} is finished; continuing with sft second\n" in out
    assert run_records["first"]["command"] == "llm-align sft first"
    assert run_records["second"]["command"] == "llm-align sft second"
    assert run_records["second"]["init_from"]["files"] == run_records["first"]["files"]
    metrics = [run_records[name]["metrics"] for name in ("first", "second")]
    assert metrics[1]["eval/loss_before"] == metrics[0]["eval/loss_after"]

    monkeypatch.setattr(fit, "fit", lambda *_, **__: pytest.fail("it trains again"))
    status, out, _ = call("sft", "second")
    assert status == 0 and f"starts from {first} (sft/first)\n" in out and len(records(here)) == 2


def test_a_name_and_a_recipe_lead_to_the_same_run(call: Call, here: Path) -> None:
    assert call("sft", "second")[0] == 0
    (first,) = (here / "runs").glob("sft-first-*")
    for parent in ("sft-first", first.name, f"runs/{first.name}/", str(first), "sft/first"):
        assert call("sft", "second", "--from", parent)[0] == 0
    assert len(records(here)) == len(list((here / "runs").iterdir())) == 2
    result = run(load_recipe("second", init_from=first))
    assert result.record["digest"] == records(here)["second"]["digest"]
    assert load_tuned(result.directory).model.training is False


def test_show_and_data_take_a_parent_run(call: Call, here: Path) -> None:
    assert call("sft", "first")[0] == 0
    (name,) = (path.name for path in (here / "runs").iterdir())
    status, out, _ = call("show", "second", "--from", "sft-first", "--json")
    shown = {row["key"]: (row["value"], row["origin"]) for row in json.loads(out)["settings"]}
    assert status == 0 and shown["adapter.rank"] == (2, f"run {name}")
    assert shown["model.init_from"] == (f"runs/{name}", "command line")
    assert shown["data.template"] == ("alpaca", f"run {name}")
    assert call("data", "second", "--from", "sft-first", "--rows", "0")[0] == 0


def test_a_problem_in_the_required_recipe_is_reported_before_anything_runs(call: Call, here: Path) -> None:
    path = here / "recipes" / "sft" / "first.yaml"
    path.write_text(path.read_text().replace("rank: 2", "ranks: 2"))
    status, _, err = call("sft", "second")
    assert status == 2 and "adapter.ranks (first.yaml:4): unknown key" in err
    assert not (here / "runs").exists()


def test_a_killed_required_run_resumes(call: Call, here: Path) -> None:
    assert call("sft", "second")[0] == 0
    expected = {name: record["files"] for name, record in records(here).items()}
    (here / "runs").rename(here / "whole")
    command = [sys.executable, "-m", "align", "sft", "second"]
    for prefix in ("sft-first", "sft-second"):
        process = warm.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list((here / "runs").glob(f"{prefix}-*/metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert warm.run(command, capture_output=True).returncode == 0
    assert {name: record["files"] for name, record in records(here).items()} == expected
