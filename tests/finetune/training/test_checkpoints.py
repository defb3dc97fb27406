"""Checkpoint checksums: the newest complete and unchanged checkpoint is used."""

import json
from pathlib import Path

import pytest

from finetune.training.checkpoints import CHECKSUM_FILE, find_last_valid, remove_newer_than, write_checksums


def checkpoint(folder: Path, step: int, *, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(b"weights of step " + str(step).encode())
    (path / "inner" / "state.json").write_text("{}")
    if complete:
        write_checksums(path)
    return path


def test_without_checkpoints_training_starts_at_step_0(tmp_path: Path) -> None:
    last = find_last_valid(tmp_path / "nowhere")
    assert (last.path, last.step, last.corrupt) == (None, 0, [])


def test_the_highest_step_wins_not_the_last_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    last = find_last_valid(tmp_path)
    assert last.path == tmp_path / "checkpoint-100" and last.step == 100 and last.corrupt == []


def test_checksums_cover_every_file(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 3)
    checksums = json.loads((path / CHECKSUM_FILE).read_text())
    assert set(checksums) == {"weights.safetensors", "inner/state.json"}
    assert all(len(value) == 64 for value in checksums.values())
    assert not (path / f"{CHECKSUM_FILE}.partial").exists()


def test_a_checkpoint_without_checksums_is_ignored(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 8, complete=False)
    last = find_last_valid(tmp_path)
    assert last.step == 4 and last.corrupt == [], "a kill is no damage to tell"


def flip(path: Path) -> None:
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[0] ^= 1
    (path / "weights.safetensors").write_bytes(content)


CORRUPTIONS = {
    "one bit": (flip, "weights.safetensors: checksum mismatch"),
    "cut short": (
        lambda path: (path / "weights.safetensors").write_bytes(b"wei"),
        "weights.safetensors: checksum mismatch",
    ),
    "a file gone": (lambda path: (path / "inner" / "state.json").unlink(), "inner/state.json is missing"),
    "seal cut short": (
        lambda path: (path / CHECKSUM_FILE).write_text('{"a": '),
        f"{CHECKSUM_FILE} is unreadable",
    ),
    "seal of zeros": (
        lambda path: (path / CHECKSUM_FILE).write_bytes(b"\0" * 40),
        f"{CHECKSUM_FILE} is unreadable",
    ),
    "seal in no text": (
        lambda path: (path / CHECKSUM_FILE).write_bytes(b"\xff\xfe"),
        f"{CHECKSUM_FILE} is unreadable",
    ),
    "seal of another shape": (
        lambda path: (path / CHECKSUM_FILE).write_text("[1]"),
        f"{CHECKSUM_FILE} is unreadable",
    ),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_is_reported_and_the_previous_checkpoint_used(tmp_path: Path, kind: str) -> None:
    corrupt, message = CORRUPTIONS[kind]
    checkpoint(tmp_path, 2)
    corrupt(checkpoint(tmp_path, 4))
    last = find_last_valid(tmp_path)
    assert last.step == 2
    [problem] = last.corrupt
    assert problem.startswith(str(tmp_path / "checkpoint-4")) and message in problem


def test_two_corrupt_checkpoints_are_reported_newest_first(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        flip(checkpoint(tmp_path, step))
    last = find_last_valid(tmp_path)
    assert last.path is None and last.step == 0
    assert [problem.split(":")[0][-1] for problem in last.corrupt] == ["6", "4", "2"]


def test_other_folders_are_not_touched(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-copy of 2").mkdir()
    assert find_last_valid(tmp_path).step == 2
    remove_newer_than(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-copy of 2"]


def test_later_steps_are_removed(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        checkpoint(tmp_path, step)
    remove_newer_than(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
