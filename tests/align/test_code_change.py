"""An interrupted run whose user functions were changed: refused with a way on, or resumed if accepted."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.training.context import RunContext
from finetune.training.fingerprint import find_code_change, function_digests
from finetune.training.run_directory import RunDirectory

OLD, NEW = "return 1.0\n", "return 2.0\n"
Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Hello {i}"}) + "\n" for i in range(4)))
    Path("short.yaml").write_text("stage: rloo\nmodel: {base: tiny}\ndata: {held_out: 1}\n")
    write_code(OLD)

    def recipe(out: str | None = None, **settings: Any) -> Recipe:
        given = {"data.source": "prompts.jsonl", "rewards.sources": "rules.py:rule"}
        given |= {key.replace("__", "."): value for key, value in settings.items()}
        return read_recipe("rloo", "short.yaml", shortcuts=given, out=Path(out) if out else None)

    return recipe


def write_code(body: str) -> None:
    Path("rules.py").write_text(f"def rule(prompt, completion):\n    {body}")


def start(
    recipe: Recipe, *, status: str = "interrupted", step: int = 0, accept: bool = False
) -> RunDirectory:
    """Begin a run as its stage does, and stop it with a checkpoint."""
    run = RunDirectory.of(recipe, force=False, accept_changed_code=accept)
    with run.locked():
        RunContext(recipe, run, Console(quiet=True), "a command")._write_initial_record({})
        run.update(status=status)
    if step:
        checkpoint = run.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checksums.json").write_text("{}")
    return run


@pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
def test_changed_code_is_refused_with_the_file_and_the_option(make: Make, status: str) -> None:
    start(make("run"), status=status)
    before = Path("run/run.json").read_text()
    write_code(NEW)
    with pytest.raises(UserError) as message:
        RunDirectory.of(make("run"), force=False)
    [problem] = message.value.problems
    assert "another version of rules.py" in problem.actual and "--accept-changed-code" in problem.repair
    assert Path("run/run.json").read_text() == before


def test_an_accepted_change_is_recorded_with_both_digests_and_its_step(make: Make) -> None:
    first = start(make("run"), step=6)
    [old_code] = function_digests(make("run").settings).values()
    write_code(NEW)
    resumed = start(make("run"), step=8, accept=True)
    [change] = json.loads(Path("run/run.json").read_text())["code_changes"]
    [new_code] = function_digests(make("run").settings).values()
    assert change["step"] == 6
    assert change["functions"] == {"rules.py:rule": {"before": old_code, "after": new_code}}
    assert (change["digest_before"], change["digest_after"]) == (first.digest, resumed.digest)
    assert first.digest != resumed.digest == resumed.record["digest"]
    # From now on the new code is that of the run; a second change is another entry.
    assert RunDirectory.of(make("run"), force=False).code_change is None
    write_code("return 3.0\n")
    again = start(make("run"), accept=True)
    assert [entry["step"] for entry in again.record["code_changes"]] == [6, 8]
    assert again.first_fingerprint == first.fingerprint


OTHER_CHANGES: dict[str, dict[str, Any]] = {
    "a setting": {"train__learning_rate": 0.123},
    "another function": {"rewards__sources": "other.py:rule"},
    "a weight": {"rewards__sources": [{"function": "rules.py:rule", "weight": 2.0}]},
    "one more function": {"rewards__sources": ["rules.py:rule", {"function": "other.py:rule", "name": "x"}]},
    "data": {"data__source": "other.jsonl"},
}


@pytest.mark.parametrize("settings", OTHER_CHANGES.values(), ids=list(OTHER_CHANGES))
def test_any_other_change_is_refused_as_ever(make: Make, settings: dict[str, Any]) -> None:
    start(make("run"))
    write_code(NEW)
    Path("other.py").write_text(Path("rules.py").read_text())
    Path("other.jsonl").write_text('{"prompt": "Bye"}\n')
    with pytest.raises(UserError, match="a run with other settings or data") as message:
        RunDirectory.of(make("run", **settings), force=False, accept_changed_code=True)
    assert "--accept" not in str(message.value)


def test_changed_rows_are_no_changed_code(make: Make) -> None:
    start(make("run"))
    write_code(NEW)
    Path("prompts.jsonl").write_text('{"prompt": "Bye"}\n')
    with pytest.raises(UserError, match="a run with other settings or data"):
        RunDirectory.of(make("run"), force=False, accept_changed_code=True)


def test_without_a_change_the_option_does_nothing(make: Make) -> None:
    start(make("run"))
    run = RunDirectory.of(make("run"), force=False, accept_changed_code=True)
    assert run.code_change is None and run.note == ""
    new = RunDirectory.of(make("new"), force=False, accept_changed_code=True)
    assert new.record == {} and new.code_change is None


def test_a_finished_run_is_not_resumed_with_other_code(make: Make) -> None:
    start(make("run"), status="finished")
    write_code(NEW)
    with pytest.raises(UserError, match="a run with other settings or data"):
        RunDirectory.of(make("run"), force=False, accept_changed_code=True)


def test_a_run_without_out_is_found_by_what_it_is(make: Make) -> None:
    first = start(make())
    write_code(NEW)
    # As before a new run begins, which names the interrupted one and the option.
    new = RunDirectory.of(make(), force=False)
    assert new.path != first.path and new.record == {}
    assert re.search(rf"{first.path} .* rules.py.*--accept-changed-code", new.note)
    resumed = start(make(), accept=True)
    assert resumed.path == first.path
    # The same command, with the option or without it, is that run.
    assert [RunDirectory.of(make(), force=False, accept_changed_code=accept).path for accept in (0, 1)] == [
        first.path
    ] * 2
    assert [path.name for path in Path("runs").iterdir()] == [first.path.name]
    forced = RunDirectory.of(make(), force=True)
    assert forced.path == first.path and forced.replaced


def test_the_newest_of_several_interrupted_runs_is_resumed(make: Make) -> None:
    for body, started in (("return 5.0\n", "2025-01-02"), (OLD, "2025-01-01")):
        write_code(body)
        start(make()).update(started=started)
    Path("runs/rloo-short-damaged").mkdir()
    Path("runs/rloo-short-damaged/run.json").write_text("{")
    write_code(NEW)
    resumed = RunDirectory.of(make(), force=False, accept_changed_code=True)
    assert resumed.record["started"] == "2025-01-02"


def test_a_run_s_own_recipe_continues_that_run(make: Make) -> None:
    run = start(make("elsewhere"))
    write_code(NEW)
    own = read_recipe("rloo", str(run.path / "recipe.yaml"))
    resumed = RunDirectory.of(own, force=False, accept_changed_code=True)
    assert resumed.path == run.path and resumed.code_change is not None


def test_a_changed_local_import_is_a_change_of_code(make: Make) -> None:
    Path("helper.py").write_text("SCALE = 1\n")
    Path("rules.py").write_text("import helper\n\ndef rule(prompt, completion):\n    return helper.SCALE\n")
    run = start(make("run"))
    assert find_code_change(make("run"), run.record) is None
    Path("helper.py").write_text("SCALE = 2\n")
    change = find_code_change(make("run"), run.record)
    assert change is not None and change.files == "rules.py"


def test_a_changed_grader_is_a_change_of_code(make: Make) -> None:
    Path("grader.py").write_text("def judge(prompt, reply):\n    return 1.0\n")
    graders = {"evaluate__graders": {"judge": "grader.py:judge"}}
    start(make("run", **graders))
    Path("grader.py").write_text("def judge(prompt, reply):\n    return 2.0\n")
    with pytest.raises(UserError, match=r"another version of grader\.py"):
        RunDirectory.of(make("run", **graders), force=False)
    run = RunDirectory.of(make("run", **graders), force=False, accept_changed_code=True)
    assert run.code_change is not None and run.code_change.files == "grader.py"
    assert run.fingerprint != RunDirectory.of(make("other"), force=False).fingerprint
