"""Nobody reads the output any more: verbs end silently, and a run saves a checkpoint and stops."""

import errno
import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import warm

from align.cli.exit_status import CLOSED_OUTPUT, fail
from finetune.distributed.interrupts import OutputClosed, SignalFlag, catch_signals
from finetune.recipe.console import Terminal, when_lost
from finetune.recipe.disk import StorageError
from finetune.recipe.recipe import read_recipe
from finetune.training.stage import run_stage

RECIPE = """\
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 0, max_length: 128}}
adapter: {{method: lora, rank: 4, dropout: 0.0}}
train: {{max_steps: 6, batch_size: 4, log_every: 1, learning_rate: 1e-2, checkpoint_every: 4}}
evaluate: {{samples: 0}}
"""


class LostOutput(StringIO):
    """An output that fails once a text was written."""

    def __init__(self, last: str, error: OSError) -> None:
        super().__init__()
        self.last, self.error, self.is_lost = last, error, False

    def write(self, text: str) -> int:
        if self.is_lost:
            raise self.error
        self.is_lost = self.last in text
        return super().write(text)


LOST = [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "Input/output error")]


def test_a_run_saves_a_checkpoint_and_resumes(base_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(base=base_folder, rows=rows_file))
    recipe = read_recipe("sft", str(tmp_path / "r.yaml"), out=tmp_path / "run")
    console = Terminal(file=LostOutput("step 2/6", LOST[0]))
    with pytest.raises(
        OutputClosed, match=r"stopped by a closed output at step \d; checkpoint saved"
    ) as error:
        run_stage(recipe, console)
    # The first line after step 2 fails: of step 3, or a later one on a fast machine.
    step = int(str(error.value).partition("at step ")[2][0])
    assert 3 <= step < 6
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    assert f"checkpoint-{step}" in os.listdir(tmp_path / "run" / "checkpoints")
    output = StringIO()
    result = run_stage(recipe, Terminal(file=output))
    assert f"resuming from step {step}" in output.getvalue() and result.record["status"] == "finished"


@pytest.mark.parametrize("error", LOST, ids=["pipe", "terminal"])
def test_a_run_prints_no_more(error: OSError) -> None:
    console, flag = Terminal(file=LostOutput("a", error)), SignalFlag()
    with when_lost(console, flag.output_closed):
        for text in ("a", "b", "c"):
            console.print(text)
    assert flag.signal_name == "a closed output" and console.quiet


def test_outside_of_a_run_the_error_is_raised() -> None:
    console = Terminal(file=LostOutput("a", LOST[0]))
    console.print("a")
    with pytest.raises(BrokenPipeError):
        console.print("b")
    console = Terminal(file=LostOutput("a", OSError(errno.ENOSPC, "No space left on device")))
    console.print("a")
    with pytest.raises(StorageError, match="standard output: the disk is full\n"):
        console.print("b")


@pytest.mark.parametrize("words", [["list", "losses"], ["list", "adapters", "--json"], ["show"], ["--help"]])
def test_a_verb_ends_silently(words: list[str], tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "align", *words]
    process = warm.Popen(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert process.communicate()[1] == "" and process.returncode == CLOSED_OUTPUT


def test_a_verb_whose_output_is_a_file_on_a_full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "align", "list", "losses"]
        process = warm.Popen(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    message = process.communicate()[1]
    assert process.returncode == 2 and message.count("standard output: the disk is full") == 1
    assert "Traceback" not in message and "Exception ignored" not in message


def test_a_message_without_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", LostOutput("", LOST[0]))
    sys.stderr.write("")
    with pytest.raises(SystemExit) as stopped:
        fail("a message", 2)
    assert stopped.value.code == 2


def test_a_closed_terminal_is_a_signal_unless_it_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with catch_signals() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # the shell and the kernel may both send it
            assert flag.signal_name == "SIGHUP"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with catch_signals() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert flag.signal_name == ""
    finally:
        signal.signal(signal.SIGHUP, before)
