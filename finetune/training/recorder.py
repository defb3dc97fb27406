"""Trainer callback of both engines: metrics.jsonl, progress, checkpoint checksums, signals, NaN."""

import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.distributed import collectives
from finetune.distributed.interrupts import NotFiniteError, SignalFlag
from finetune.training.checkpoints import write_checksums
from finetune.training.metrics import as_recorded
from finetune.training.run_directory import RunDirectory

PROGRESS_LINES = 10
LINE_SECONDS = 20.0
"""Seconds after which a run's output shows its step in any case."""
MEAN_LOSS_KEY = "train_loss"
"""The engine's last log entry: the mean loss over all steps, also those between two log entries."""


class AlreadyTrained(Exception):  # noqa: N818 - it is no error
    """The checkpoint is of the last step, or the run ends there: nothing is left to train."""


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, shows progress, writes checkpoint checksums, and stops on signals and NaN."""

    def __init__(
        self,
        run: RunDirectory,
        console: Console,
        signal_flag: SignalFlag,
        *,
        logged_keys: Collection[str],
        finish: bool = False,
    ) -> None:
        """Bind the recorder to a run.

        Args:
            run: the run directory.
            console: receives the progress.
            signal_flag: set by a signal.
            logged_keys: the metrics that are written to metrics.jsonl.
            finish: take no step after the checkpoint.
        """
        self.run = run
        self.logged_keys = logged_keys
        self.console = console
        self.signal_flag = signal_flag
        self.finish = finish
        self.progress = Progress(
            TextColumn("  "),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.started = 0.0
        self.last_line = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the progress bar.

        Raises:
            AlreadyTrained: no step is left.
        """
        # Resumed in the middle of an epoch, the engine would run one more step before it checks max_steps.
        if self.finish or state.global_step >= state.max_steps:
            raise AlreadyTrained
        self.started = self.last_line = time.monotonic()
        self.first_step = state.global_step
        self.task = self.progress.add_task(
            "", total=state.max_steps, completed=state.global_step, loss="-", rate=""
        )
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show progress; after a signal on any rank, all ranks save a checkpoint and stop."""
        self.progress.update(self.task, completed=state.global_step, rate=self._rate(state))
        # All ranks stop at the same step, or those that train on would wait for the others in a collective.
        if collectives.any_rank(bool(self.signal_flag.signal_name)):
            self.signal_flag.signal_name = next(
                filter(None, collectives.all_gather_object(self.signal_flag.signal_name))
            )
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a log entry to metrics.jsonl.

        Raises:
            NotFiniteError: a metric such as loss or gradient norm is NaN or infinite.
        """
        # Before the entry is written: JSON has no NaN.
        logs = {as_recorded(name): value for name, value in (logs or {}).items()}
        for key in (*self.logged_keys, MEAN_LOSS_KEY):
            if not math.isfinite(logs.get(key, 0.0)):
                raise NotFiniteError(f"{key} is {logs[key]} at step {state.global_step}")
        entry = {key: value for key, value in logs.items() if key in self.logged_keys}
        if not entry:
            return
        self.run.append_metrics({"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **entry})
        if "loss" in entry:
            self.progress.update(self.task, loss=f"{entry['loss']:.4f}")
            self._print_progress(state, entry["loss"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the checksums of the engine's new checkpoint, after every rank has written its files."""
        collectives.barrier()
        if self.run.is_writer:
            self.run.check_present()
            write_checksums(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        # No rank may stop or train on before the checkpoint is valid.
        collectives.barrier()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the progress bar."""
        self.progress.stop()

    def _rate(self, state: TrainerState) -> str:
        seconds = time.monotonic() - self.started
        return f"{(state.global_step - self.first_step) / max(seconds, 1e-9):.2f} steps/s"

    def _print_progress(self, state: TrainerState, loss: float) -> None:
        """Print progress where there is no terminal for the bar: ten times per run, or after some seconds."""
        every, now = max(1, state.max_steps // PROGRESS_LINES), time.monotonic()
        is_due = state.global_step % every == 0 or state.global_step == state.max_steps
        if self.console.is_terminal or not (is_due or now - self.last_line >= LINE_SECONDS):
            return
        self.last_line = now
        done = state.global_step - self.first_step
        seconds_left = (now - self.started) / max(done, 1) * (state.max_steps - state.global_step)
        position = f"  step {state.global_step}/{state.max_steps}  loss {loss:.4f}"
        text = f"{position}  {self._rate(state)}  {seconds_left:.0f} s left"
        self.console.print(text, highlight=False)
