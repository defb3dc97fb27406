"""Checkpoint checksums: the newest complete and unchanged checkpoint is used."""

import json
from pathlib import Path

import pytest

from finetune.training.checkpoints import SEAL, find_last, remove_after, seal


def checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(b"weights of step " + str(step).encode())
    (path / "inner" / "state.json").write_text("{}")
    if sealed:
        seal(path)
    return path


def test_without_checkpoints_training_starts_at_step_0(tmp_path: Path) -> None:
    found = find_last(tmp_path / "nowhere")
    assert (found.path, found.step, found.damaged) == (None, 0, [])


def test_the_highest_step_wins_not_the_last_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    found = find_last(tmp_path)
    assert found.path == tmp_path / "checkpoint-100" and found.step == 100 and found.damaged == []


def test_the_seal_names_every_file(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 3)
    sums = json.loads((path / SEAL).read_text())
    assert set(sums) == {"weights.safetensors", "inner/state.json"}
    assert all(len(value) == 64 for value in sums.values())
    assert not (path / f"{SEAL}.partial").exists()


def test_an_unsealed_checkpoint_was_never_finished(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 8, sealed=False)
    found = find_last(tmp_path)
    assert found.step == 4 and found.damaged == [], "a kill is no damage to tell"


def flip(path: Path) -> None:
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[0] ^= 1
    (path / "weights.safetensors").write_bytes(content)


DAMAGE = {
    "one bit": (flip, "weights.safetensors: checksum mismatch"),
    "cut short": (
        lambda path: (path / "weights.safetensors").write_bytes(b"wei"),
        "weights.safetensors: checksum mismatch",
    ),
    "a file gone": (lambda path: (path / "inner" / "state.json").unlink(), "inner/state.json is missing"),
    "seal cut short": (lambda path: (path / SEAL).write_text('{"a": '), f"{SEAL} is unreadable"),
    "seal of zeros": (lambda path: (path / SEAL).write_bytes(b"\0" * 40), f"{SEAL} is unreadable"),
    "seal in no text": (lambda path: (path / SEAL).write_bytes(b"\xff\xfe"), f"{SEAL} is unreadable"),
    "seal of another shape": (lambda path: (path / SEAL).write_text("[1]"), f"{SEAL} is unreadable"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    hurt, message = DAMAGE[kind]
    checkpoint(tmp_path, 2)
    hurt(checkpoint(tmp_path, 4))
    found = find_last(tmp_path)
    assert found.step == 2
    [told] = found.damaged
    assert told.startswith(str(tmp_path / "checkpoint-4")) and message in told


def test_two_damaged_ones_are_both_told_newest_first(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        flip(checkpoint(tmp_path, step))
    found = find_last(tmp_path)
    assert found.path is None and found.step == 0
    assert [line.split(":")[0][-1] for line in found.damaged] == ["6", "4", "2"]


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-copy of 2").mkdir()
    assert find_last(tmp_path).step == 2
    remove_after(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-copy of 2"]


def test_later_steps_are_removed(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        checkpoint(tmp_path, step)
    remove_after(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
