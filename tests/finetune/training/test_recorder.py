"""Progress lines of a run whose output is not a terminal."""

import io
from pathlib import Path

import pytest
from fixture_types import MakeRecipe
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.distributed.interrupts import SignalFlag
from finetune.training import recorder
from finetune.training.recorder import Recorder
from finetune.training.run_directory import RunDirectory


@pytest.mark.parametrize(
    ("seconds_per_step", "steps"),
    [(0.1, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]), (9.0, [3, 6, 9, 10, 13, 16, 19, 20])],
    ids=["ten lines", "a line after 20 s at most"],
)
def test_lines_with_the_step(
    seconds_per_step: float,
    steps: list[int],
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, now = io.StringIO(), 0.0
    monkeypatch.setattr(recorder.time, "monotonic", lambda: now)
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run", make_recipe("run"), "")
    observer = Recorder(run, Console(file=output, width=80), SignalFlag(), logged_keys=["loss"])
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    observer.on_train_begin(args, TrainerState(max_steps=100), control)
    for step in range(1, steps[-1] + 1):
        now += seconds_per_step
        observer.on_log(args, TrainerState(max_steps=100, global_step=step), control, logs={"loss": 1.0})
    assert [int(line.split()[1].split("/")[0]) for line in output.getvalue().splitlines()] == steps
