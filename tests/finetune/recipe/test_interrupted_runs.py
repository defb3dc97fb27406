"""Runs that stopped: used at their last checkpoint, told truthfully; printed commands paste into a shell."""

import json
import shlex
from pathlib import Path

import pytest

from finetune.recipe.bases import resolve_base
from finetune.recipe.checkpoint_folder import run_of_checkpoint, write_merged_from
from finetune.recipe.errors import UserError
from finetune.recipe.runs import FORMAT, find_run, read_finished_record
from finetune.recipe.terminal import command_line, typed_command

WORDS = [
    "sft",
    "my recipe.yaml",
    "--data",
    "a b's.jsonl",
    "data.mix=[{source: x}]",
    "--out",
    "$HOME/{a}",
    "한글",
]
RELOAD = {"model": {"base": "tiny"}, "template": "alpaca", "system_prompt": None, "virtual_tokens": 0}


def write_run(
    folder: Path, *, status: str = "running", steps: tuple[int, ...] = (), **fields: object
) -> Path:
    """Write the files that a run leaves when its process ends without a word: nobody holds its lock."""
    record = {
        "format": FORMAT,
        "status": status,
        "stage": "sft",
        "recipe": "r",
        "digest": "0" * 8,
        "steps": 100,
    }
    record |= {"command": "llm-align sft r --force", "reload": RELOAD} | fields
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    for step in steps:
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        config = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 4}
        (checkpoint / "adapter_config.json").write_text(json.dumps(config))
        (checkpoint / "adapter_model.safetensors").write_bytes(b"x")
        (checkpoint / "checksums.json").write_text("{}")
    return folder


@pytest.mark.parametrize("status", ["running", "interrupted", "stopped", "failed"])
def test_a_stopped_run_is_used_at_its_last_checkpoint(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A library's exception; one that failed by its own numbers (NaN) has no cause.
    write_run(Path("runs/sft-r-1"), status=status, steps=(80, 100), cause={"type": "RuntimeError"})
    expected = Path("runs/sft-r-1/checkpoints/checkpoint-100")
    for name in ("sft-r-1", "sft-r", "runs/sft-r-1"):
        folder, note = find_run(name)
        assert folder == expected and "at step 100 of 100: using" in note
    record = read_finished_record(expected)
    assert record["reload"] == RELOAD and record["stage"] == "sft"
    assert run_of_checkpoint(expected) == Path("runs/sft-r-1") and run_of_checkpoint(tmp_path) is None


def test_an_incomplete_checkpoint_is_not_used(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=(20, 40))
    (run / "checkpoints/checkpoint-40/checksums.json").unlink()
    assert find_run(str(run))[0].name == "checkpoint-20"


@pytest.mark.parametrize("fields", [{"stage": "ppo"}, {"stage": "reward"}, {"reload": {"heads": ["score"]}}])
def test_a_run_with_heads_is_finished_first(fields: dict[str, object], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=(20,), **fields)
    with pytest.raises(UserError, match="`llm-align sft r` resumes from step 20"):
        find_run(str(run))


def test_a_run_that_became_nan_is_not_used(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status="failed", steps=(20,))
    with pytest.raises(UserError, match="status 'failed'(?s:.*)list runs"):
        find_run(str(run))


def test_a_run_without_a_checkpoint_does_not_promise_to_resume(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="status 'stopped'") as caught:
        find_run(str(run))
    assert "`llm-align sft r` starts again: it has no checkpoint" in str(caught.value)


def test_no_repair_of_a_damaged_run_deletes_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", status="finished")
    (run / "run.json").write_text((run / "run.json").read_text().replace('"reload"', '"other"'))
    with pytest.raises(UserError) as caught:
        read_finished_record(run)
    assert f"`llm-align sft r --out '{run}-again'`" in str(caught.value) and "--force" not in str(
        caught.value
    )


@pytest.mark.parametrize("word", [*WORDS, "a\nb", "", "*.jsonl", "a;b", "`x`", '"', "~", "!"])
def test_printed_commands_paste(word: str) -> None:
    assert shlex.split(command_line("sft", word)) == ["llm-align", "sft", word]


def test_the_recorded_command_has_no_force() -> None:
    assert shlex.split(typed_command([*WORDS, "--force"])) == ["llm-align", *WORDS]


def test_merged_weights_are_those_of_the_run_or_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status="interrupted", steps=(20,))
    checksums = run / "checkpoints/checkpoint-20/checksums.json"
    checksums.write_text('{"adapter_model.safetensors": "a", "optimizer.pt": "b"}')
    merged = run / "merged"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    record = read_finished_record(checksums.parent)
    assert record["files"] == {"adapter_model.safetensors": "a"} and record["steps"] == 20
    write_merged_from(merged, record)
    assert resolve_base(str(run)) == str(merged)
    (run / "run.json").write_text(
        json.dumps(record | {"status": "finished", "files": {"adapter/x": "c"}, "steps": 100})
    )
    with pytest.raises(UserError, match="the weights of step 20, and the run is at step 100") as caught:
        resolve_base(str(run))
    assert f"`llm-align merge {run}` renews it" in str(caught.value)
