"""A damaged run is listed with its reason and breaks nothing else; a run without a process is stopped."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from align.cli import cli
from finetune.recipe.errors import UserError
from finetune.recipe.recipe_name import is_override
from finetune.recipe.runs import FORMAT, find_run, list_runs, read_run_record
from finetune.training.atomic_files import locked_folder

RECORD = {
    "format": FORMAT,
    "status": "finished",
    "stage": "sft",
    "recipe": "quickstart",
    "digest": "11111111",
    "command": "llm-align sft",
    "started": "2026-01-01",
    "finished": "2026-01-02",
    "reload": {},
    "files": {},
}


def without(*names: str) -> str:
    return json.dumps({name: value for name, value in RECORD.items() if name not in names})


DAMAGED: dict[str, tuple[str | bytes | Callable[[Path], object], str]] = {
    "truncated": ('{\n"status": "fin', "run.json: corrupt file"),
    "empty": ("", "run.json: corrupt file"),
    "latin-1": (b'{"recipe": "\xe4"}', "run.json: corrupt file"),
    "utf-16": (json.dumps(RECORD).encode("utf-16"), "run.json: corrupt file"),
    "zeros": (b"\0" * 64, "run.json: corrupt file"),
    "brackets": ("[" * 100_000, "run.json: corrupt file"),
    "list": ("[]", "run.json: not written by llm-align"),
    "number-as-status": (json.dumps(RECORD | {"status": 1}), "run.json: not written by llm-align"),
    "no-digest": (without("digest"), "run.json: not written by llm-align"),
    "no-reload": (without("reload"), "run.json: reload missing"),
    "text-as-metrics": (json.dumps(RECORD | {"metrics": "0.5"}), "metrics is not a mapping"),
    "lost-weights": (json.dumps(RECORD | {"files": {"adapter/a.safetensors": "0"}}), "a.safetensors missing"),
    "folder": (lambda run: (run / "run.json").mkdir(), "run.json: cannot be read: Is a directory"),
    "loop": (lambda run: (run / "run.json").symlink_to("run.json"), "symbolic links"),
    "dangling": (lambda run: (run / "run.json").symlink_to("nothing"), "run.json is missing"),
    "no-record": (lambda run: (run / "recipe.yaml").touch(), "run.json is missing"),
}


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return ./runs with two good runs and every damaged one."""
    monkeypatch.chdir(tmp_path)
    for name, (content, _) in DAMAGED.items():
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        if callable(content):
            content(run)
        else:
            (run / "run.json").write_bytes(content.encode() if isinstance(content, str) else content)
    for name in ("good", "truncated-2"):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(RECORD))
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "file.txt").touch()
    return tmp_path / "runs"


def listed() -> dict[str, str]:
    result = CliRunner().invoke(cli, ["list", "runs", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    content: dict[str, dict[str, str]] = json.loads(result.output)
    return content["runs"]


def test_list_has_every_run_with_its_status_or_damage() -> None:
    lines = listed()
    assert lines.keys() == {f"runs/{name}" for name in [*DAMAGED, "good", "truncated-2"]}
    for name, (_, damage) in DAMAGED.items():
        assert lines[f"runs/{name}"].startswith("damaged: ") and damage in lines[f"runs/{name}"]
    assert lines["runs/good"] == "finished, 2026-01-01"


def test_other_kinds_and_verbs_do_not_notice() -> None:
    for words in (["list"], ["list", "recipes"]):
        assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    assert find_run("goo") == (Path("runs/good"), "")
    # The only readable match of three folders with this prefix.
    assert find_run("trunc") == (Path("runs/truncated-2"), "")


@pytest.mark.parametrize("name", ["empty", "runs/no-reload", "runs/brackets", "lost", "text-as"])
def test_a_damaged_run_that_is_named_is_an_error_with_its_reason(name: str) -> None:
    damage = next(text for key, (_, text) in DAMAGED.items() if key.startswith(name.removeprefix("runs/")))
    with pytest.raises(UserError) as error:
        find_run(name)
    assert damage in str(error.value) and "repair:" in str(error.value)


def test_the_status_of_a_run_is_that_of_its_process(runs: Path) -> None:
    (runs / "good" / "run.json").write_text(json.dumps(RECORD | {"status": "running"}))
    with locked_folder(runs / "good", in_use=None, unwritable=None):  # type: ignore[arg-type]
        assert read_run_record(runs / "good")["status"] == "running"
        assert listed()["runs/good"] == "running, 2026-01-01"
        with pytest.raises(UserError, match="status 'running'(?s:.*)wait until it finishes"):
            find_run("good")
    # The lock file is still there: a process that ended leaves it too.
    assert (runs / "good" / ".lock").exists() and listed()["runs/good"] == "stopped, 2026-01-01"
    with pytest.raises(UserError, match="status 'stopped'(?s:.*)`llm-align sft` starts again"):
        find_run("good")
    assert next(run for run in list_runs() if run.path.name == "good").record["status"] == "stopped"


def test_a_name_that_is_not_utf_8(runs: Path) -> None:
    (runs / "good").rename(runs / "go\udcffod")
    assert listed()["runs/go\udcffod"] == "finished, 2026-01-01"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("exp=1/r.yaml", False),
        ("exp=1/missing.yaml", False),
        ("./lr=2e-4.yaml", False),
        ("data.source=exp=1/r.yaml", True),
        ("train.epochs=1", True),
        ("alpaca", False),
        ("data.system_prompt=" + "long " * 100 + "/.yaml", True),
    ],
)
def test_a_path_with_an_equals_sign_is_no_override(tmp_path: Path, word: str, expected: bool) -> None:
    (tmp_path / "exp=1").mkdir()
    (tmp_path / "exp=1" / "r.yaml").touch()
    assert is_override(word) is expected


@pytest.mark.parametrize("verb", ["show", "sft --dry-run", "data", "plan"])
def test_every_verb_takes_such_a_path(tmp_path: Path, verb: str) -> None:
    (tmp_path / "exp=1").mkdir()
    (tmp_path / "exp=1" / "r.yaml").write_text("train: {epochs: no}\n")
    with pytest.raises(UserError, match=r"train.epochs \(r.yaml:1\)"):
        CliRunner().invoke(cli, [*verb.split(), "exp=1/r.yaml"], catch_exceptions=False)
    with pytest.raises(UserError, match=r"exp=1/s.yaml: no such file(?s:.*)exp=1 contains r.yaml"):
        CliRunner().invoke(cli, [*verb.split(), "exp=1/s.yaml"], catch_exceptions=False)
