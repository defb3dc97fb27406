"""A killed build of DeepSpeed's extensions is reported before DeepSpeed would wait for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from align import cli
from finetune.distributed.deepspeed_setup import check_extension_builds, stale_locks
from finetune.recipe.errors import UserError

BUILD = """
import os, sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the place of a lock in an extension folder of its own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    folder = tmp_path / "extensions" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    return folder / "lock"


def test_a_lock_is_stale_once_its_build_was_killed(lock: Path) -> None:
    build = subprocess.Popen([sys.executable, "-c", BUILD, str(lock)], stdout=subprocess.PIPE)
    try:
        assert build.stdout is not None and build.stdout.readline() == b"building\n"
        assert lock.exists() and stale_locks(lock.parents[1]) == []
        check_extension_builds("zero2")
    finally:
        build.kill()
        build.wait()
    assert stale_locks(lock.parents[1]) == [lock]
    check_extension_builds("ddp")
    with pytest.raises(UserError) as caught:
        check_extension_builds("zero3")
    [problem] = caught.value.problems
    assert problem.where == str(lock) and "'deepspeed_shm_comm' was killed" in problem.actual
    assert problem.repair.startswith(f"rm '{lock}'")
    lock.unlink()
    check_extension_builds("zero3")


def test_a_finished_build_has_no_lock(lock: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire() and stale_locks(lock.parents[1]) == []
    baton.release()
    assert stale_locks(lock.parents[1]) == []


def test_locks_of_other_programs_are_left_alone(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    build = lock.with_name("build.ninja")
    build.write_text("cflags = -I/site-packages/deepspeed/ops/csrc")
    assert stale_locks(lock.parents[1]) == [lock]
    build.write_text("cflags = -I/site-packages/other/csrc")
    assert stale_locks(lock.parents[1]) == []
    build.unlink()
    monkeypatch.setattr(os, "getuid", lambda: lock.stat().st_uid + 1)
    assert stale_locks(lock.parents[1]) == [], "another user's processes hide their files"


def test_a_run_with_zero_stops_at_once(
    lock: Path,
    base_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lock.touch()
    words = ["sft", "--base", str(base_folder), "--data", str(rows_file), "--out", str(tmp_path / "run")]
    words += ["data.held_out=0", "evaluate.samples=0", "train.strategy=zero2", "train.num_processes=2"]
    monkeypatch.setattr("sys.argv", ["llm-align", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    message = capsys.readouterr().err
    assert end.value.code == 2 and f"rm '{lock}'" in message and not (tmp_path / "run" / "run.json").exists()
