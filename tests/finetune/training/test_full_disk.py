"""A full or read-only disk: one message, status `stopped`, the same command resumes; space is checked."""

import errno
import json
import os
import pickle
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fixture_types import MakeRecipe, Tune
from safetensors import SafetensorError

from data_templates.segments import Message
from finetune.data import row_store
from finetune.data.cache import write_cached
from finetune.data.conversation import Conversation
from finetune.data.mapped_cache import write_mapped
from finetune.recipe.disk import StorageError, check_free_space, storage_error, writing, writing_inside
from finetune.recipe.runs import read_run_record
from finetune.training.atomic_files import atomic_folder, write_text_atomically
from finetune.training.disk_plan import DiskPlan
from finetune.training.run_directory import RunDirectory

Usage = namedtuple("Usage", "total used free")
TORCH = "[enforce fail at inline_container.cc:672] . unexpected pos 1798208 vs 1798100"


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let this process write no byte beyond this position of a file, as on a disk that is full there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: "),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up: "),
    (OSError(errno.EROFS, "Read-only file system"), "the disk is read-only"),
    (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
    (PermissionError(errno.EACCES, "Permission denied"), "no permission to write"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"), "the folder is gone"),
    (OSError(errno.ESTALE, "Stale file handle"), "the network disk is gone"),
    (OSError(errno.EIO, "Input/output error"), "input/output error"),
    (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), "the disk is full"),
    (Exception("Read-only file system (os error 30)"), "the disk is read-only"),
    (RuntimeError(TORCH), "the disk is full: "),
    (OSError("1000 requested and 46 written"), "the disk is full: "),
    (RuntimeError("basic_ios::clear: iostream error"), "the disk is full: "),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "the disk is full: "),
]


@pytest.mark.parametrize(("error", "text"), ERRORS, ids=[text for _, text in ERRORS])
def test_a_write_error_of_any_library_is_one_message(tmp_path: Path, error: Exception, text: str) -> None:
    with pytest.raises(StorageError) as raised, writing(tmp_path / "file", needed=3 * 2**20):
        raise error
    message = str(raised.value)
    assert (
        text in message and message.startswith(f"{tmp_path / 'file'}: ") and "same command again" in message
    )
    assert ("about 3.0 MiB needed" in message) == text.startswith(("the disk is full", "the disk quota"))
    copy = pickle.loads(pickle.dumps(raised.value))
    assert type(copy) is StorageError and str(copy) == message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        ValueError("os error 28"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/words.txt"),
        PermissionError(errno.EACCES, "Permission denied", "/root/key"),
    ],
)
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, writing_inside(tmp_path), writing(tmp_path / "file"):
        raise error
    assert raised.value is error


def test_a_lost_folder_is_no_full_disk_for_torch(tmp_path: Path) -> None:
    error = storage_error(RuntimeError(TORCH), tmp_path / "gone" / "checkpoint-3")
    assert error is not None and "the folder is gone" in str(error)


def test_an_atomic_write_that_fails_leaves_the_old_file_and_no_half(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.txt", "old")
    with largest_file(10), pytest.raises(StorageError, match=r"a\.txt: "):
        write_text_atomically(tmp_path / "a.txt", "x" * 100)
    with (
        largest_file(10),
        pytest.raises(StorageError, match="model: "),
        atomic_folder(tmp_path, "model") as folder,
    ):
        (folder / "weights").write_bytes(bytes(100))
    assert sorted(os.listdir(tmp_path)) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_the_status_is_replaced_in_place_where_run_json_cannot_grow(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run", make_recipe(), "12345678")
    with run.locked():
        run.update(
            format=2, status="running", recipe="a", digest="12345678", rounds={"1": {"status": "running"}}
        )
        text = (run.path / "run.json").read_text()
        with largest_file(40):
            run.record_stop(StorageError([]))
    assert (run.path / "run.json").read_text() == text.replace("running", "stopped", 1)
    assert read_run_record(run.path)["status"] == "stopped"


def test_caches_and_temporary_rows_name_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"ids": np.arange(1000)}
    for write in (write_cached, write_mapped):
        with largest_file(500), pytest.raises(StorageError, match=r"data\.cache=false"):
            write(tmp_path / "kind" / "entry", arrays, {})
    assert os.listdir(tmp_path / "kind") == []
    monkeypatch.setattr(row_store, "MAX_MEMORY", 1)
    row = Conversation([Message("user", "x" * 300), Message("assistant", "y")], "a.jsonl:1")
    with largest_file(500), pytest.raises(StorageError, match="TMPDIR"):
        rows = row_store.RowStore([row] * 50)
        rows.row(0)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="1.0 GiB free, 2.0 GiB needed: the merged model"):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, 2**30))
        check_free_space(tmp_path / "no" / "folder", 2**31, what="the merged model", repair="move it")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, 1000))
    with pytest.raises(StorageError) as raised:
        tune("run", train__checkpoint_every=1)
    message = str(raised.value)
    assert "1 KiB free" in message and "3 checkpoints of " in message and "--out" in message
    assert not (tmp_path / "run").exists()


def test_the_plan_of_checkpoints() -> None:
    plan = DiskPlan(checkpoint=100, result=10, saves=5, kept=2)
    assert plan.needed() == 310  # the third is written before the first is deleted
    assert DiskPlan(100, 10, saves=1, kept=2).needed() == 110
    assert plan.needed(2, remaining=3) == 110 and plan.needed(2, remaining=0) == 10


def test_a_run_whose_disk_fills_resumes_when_there_is_room(tune: Tune, tmp_path: Path) -> None:
    whole = tune("whole", train__max_steps=4, train__checkpoint_every=2)
    checkpoint = whole.directory / "checkpoints" / "checkpoint-4"
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    trained = whole.record["parameters"]["trained"]
    # The plan counts tensors, and two float32 moments for each; the files have headers too.
    tensors = sizes["adapter_model.safetensors"] + sizes["optimizer.pt"]
    assert 12 * trained < tensors < 1.5 * 12 * trained + 2**16
    # The adapter's file fits, the optimizer's does not: torch's writer fails in the first checkpoint.
    limit = sizes["optimizer.pt"] - 100
    assert limit > sizes["adapter_model.safetensors"]
    with largest_file(limit), pytest.raises(StorageError, match=r"checkpoints/checkpoint-2: .*ulimit"):
        tune("run", train__max_steps=4, train__checkpoint_every=2)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "stopped" and "checkpoint-2" in record["error"]
    assert os.listdir(tmp_path / "run" / "checkpoints") == []
    resumed = tune("run", train__max_steps=4, train__checkpoint_every=2)
    assert resumed.record["files"] == whole.record["files"] and "error" not in resumed.record
