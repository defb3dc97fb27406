"""A run directory belongs to one recipe and one process; foreign files are not changed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fixture_types import MakeRecipe, Tune

from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import FORMAT, read_run_record
from finetune.training.run_directory import RunDirectory


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe()


def run_of(recipe: Recipe, path: Path, digest: str = "12345678") -> RunDirectory:
    return RunDirectory(path, recipe, digest)


def started_run(recipe: Recipe, path: Path, **fields: object) -> RunDirectory:
    """Return the folder of a run that has started."""
    run = run_of(recipe, path)
    with run.locked():
        run.update(status="running", recipe="sums", digest=run.digest, format=FORMAT, **fields)
    return run


def test_opening_writes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    run = run_of(recipe, tmp_path / "a" / "b")
    run.check_usable()
    assert not run.finished and run.record == {} and not (tmp_path / "a").exists()


def test_a_new_and_an_empty_folder_may_be_used(recipe: Recipe, tmp_path: Path) -> None:
    run_of(recipe, tmp_path / "new").check_usable()
    (tmp_path / "empty").mkdir()
    run_of(recipe, tmp_path / "empty").check_usable()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_file_in_the_way(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*run: a file\n +expected: a folder, or an unused name"):
        run_of(recipe, tmp_path / "run").check_usable()
    assert (tmp_path / "run").read_text() == "mine"


def test_a_file_further_up_the_path(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(UserError, match=r"not writable: Not a directory\n.*\n +repair: +use --out"),
        run_of(recipe, tmp_path / "file" / "run").locked(),
    ):
        pass


def test_a_foreign_folder(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="a folder with other files, not a run"):
        run_of(recipe, tmp_path).check_usable()


def test_another_recipes_run(recipe: Recipe, tmp_path: Path) -> None:
    started_run(recipe, tmp_path / "run")
    with pytest.raises(UserError) as error:
        run_of(recipe, tmp_path / "run", "87654321").check_usable()
    text = str(error.value)
    assert "a run with other settings or data (sums, 12345678)" in text
    assert "87654321" in text and "--force" in text
    run_of(recipe, tmp_path / "run").check_usable()


DAMAGED, FOREIGN = r"run\.json: corrupt file", r"run\.json: not written by llm-align"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", DAMAGED),
        (b"", DAMAGED),
        (b"\xff", DAMAGED),
        (b"[]", FOREIGN),
        (b'"a"', FOREIGN),
        (b"{}", FOREIGN),
        (b'{"name": "another tool\'s"}', FOREIGN),
    ],
)
def test_a_run_json_that_no_run_wrote(recipe: Recipe, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run_of(recipe, tmp_path)
    with pytest.raises(UserError, match=message):
        read_run_record(tmp_path)


def test_one_process_at_a_time(recipe: Recipe, tmp_path: Path) -> None:
    program = f"""
import sys
from filelock import FileLock
with FileLock({str(tmp_path / "run" / ".lock")!r}):
    print("held", flush=True)
    sys.stdin.readline()
"""
    (tmp_path / "run").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin and other.stdout and other.stdout.readline() == "held\n"
    run = run_of(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="another process uses this folder"), run.locked():
        pass
    other.communicate("end\n")
    with run.locked():
        run.update(status="running", recipe="sums", digest=run.digest)
        assert read_run_record(tmp_path / "run")["status"] == "running"
    assert read_run_record(tmp_path / "run")["status"] == "stopped"


def test_a_kill_before_the_first_line_leaves_a_usable_folder(recipe: Recipe, tmp_path: Path) -> None:
    with run_of(recipe, tmp_path / "run").locked():
        (tmp_path / "run" / ".run.json.partial").write_text("{")
    assert (tmp_path / "run" / ".lock").exists()
    run_of(recipe, tmp_path / "run").check_usable()


def test_clear_deletes_only_run_files(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = started_run(recipe, path)
    for name in ("recipe.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "notes.txt"):
        (path / name).write_text("x")
    for name in ("adapter", "model", "checkpoints", "plots"):
        (path / name).mkdir()
        (path / name / "file").write_text("x")
    run.clear()
    assert run.record == {}
    left = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
    assert left == ["notes.txt", "plots"]


def test_a_kill_during_clear_leaves_no_finished_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    run = started_run(recipe, path)
    run.update(status="finished")
    (path / "adapter").mkdir()

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.training.run_directory.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.clear()
    again = run_of(recipe, path)
    assert not again.finished
    again.check_usable()
    assert again.record["status"] == "replaced"


def test_clearing_no_run_deletes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    run_of(recipe, tmp_path).clear()
    assert (tmp_path / "report.html").read_text() == "mine"


def test_update_merges_sections_and_writes_at_once(recipe: Recipe, tmp_path: Path) -> None:
    run = started_run(recipe, tmp_path, metrics={"loss_before": 2.0})
    run.update(metrics={"loss_after": 1.0}, status="finished")
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["metrics"] == {"loss_before": 2.0, "loss_after": 1.0}
    assert written["status"] == "finished" and run_of(recipe, tmp_path).finished


def test_metrics_skip_a_truncated_entry(recipe: Recipe, tmp_path: Path) -> None:
    run = run_of(recipe, tmp_path)
    assert run.metrics() == []
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [entry["step"] for entry in run.metrics()] == [1, 2, 3]
    run.truncate_after(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'
    run.append_metrics({"step": 3, "loss": 0.25})
    assert [entry["loss"] for entry in run.metrics()] == [1.0, 0.5, 0.25]


def test_atomic_folder_keeps_the_old_one_until_complete(recipe: Recipe, tmp_path: Path) -> None:
    run = run_of(recipe, tmp_path)
    with run.atomic_folder("adapter") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(OSError, match="disk full"), run.atomic_folder("adapter") as folder:
        (folder / "weights").write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "adapter" / "weights").read_text() == "old"
    with run.atomic_folder("adapter") as folder:
        assert list(folder.iterdir()) == [], "what the failed one left is gone"
        (folder / "weights").write_text("new")
    assert (tmp_path / "adapter" / "weights").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_a_finished_run_is_not_repeated(tune: Tune) -> None:
    first = tune()
    before = {file: file.stat().st_mtime_ns for file in first.directory.rglob("*") if file.name != ".lock"}
    again = tune()
    assert again.record == first.record and again.samples == first.samples
    after = {file: file.stat().st_mtime_ns for file in first.directory.rglob("*") if file.name != ".lock"}
    assert after == before


def test_force_replaces_another_recipe(tune: Tune) -> None:
    first = tune(train__max_steps=4)
    (first.directory / "notes.txt").write_text("mine")
    (first.directory / "evaluation").mkdir()  # of the replaced weights
    second = tune(train__max_steps=2, force=True)
    assert not (first.directory / "evaluation").exists()
    assert second.record["digest"] != first.record["digest"]
    assert [entry["step"] for entry in second.metrics] == [1, 2]
    assert (first.directory / "notes.txt").read_text() == "mine"
    steps = sorted(path.name for path in (first.directory / "checkpoints").iterdir())
    assert steps == ["checkpoint-2"]


def test_other_settings_name_another_folder(make_recipe: MakeRecipe) -> None:
    digests = {
        make_recipe(**change).digest("data")
        for change in ({}, {"train__seed": 1}, {"data__max_length": 100}, {"evaluate__samples": 3})
    }
    assert len(digests) == 4
    assert make_recipe().digest("data") != make_recipe().digest("other data")
