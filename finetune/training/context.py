"""RunContext: a run's recipe, folder, console, resolved values, check results, times and record."""

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from finetune import __version__
from finetune.distributed import collectives
from finetune.distributed.hardware import Hardware, detect_hardware, peak_memory_bytes
from finetune.distributed.interrupts import (
    CLOSED_OUTPUT,
    Interrupted,
    NotFiniteError,
    OutputClosed,
    SignalFlag,
    catch_signals,
)
from finetune.distributed.rank import DistInfo, dist_info
from finetune.recipe.checkpoint_folder import MERGED
from finetune.recipe.console import when_lost, working
from finetune.recipe.disk import StorageError, writing_inside
from finetune.recipe.errors import UserError, UserFunctionError
from finetune.recipe.limits import limit_keys
from finetune.recipe.recipe import Recipe, SettingsT
from finetune.recipe.runs import FORMAT, STOPPED
from finetune.recipe.terminal import command_line
from finetune.recipe.user_calls import CALLS, merge_call_times
from finetune.training.checkpoints import complete_steps
from finetune.training.fingerprint import function_digests, parent_run_record
from finetune.training.library_errors import run_errors
from finetune.training.matching_run import ACCEPT_REPAIR
from finetune.training.metric_specs import MetricSpec
from finetune.training.model_card import write_model_card
from finetune.training.preflight.checks import CheckResult, raise_if_failed
from finetune.training.report import run_summary, write_report
from finetune.training.run_directory import RunDirectory
from finetune.training.schedule import COMPLETE_SCHEDULE, SchedulePart
from finetune.training.stored_rows import store_rows

Value = TypeVar("Value")
RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "bitsandbytes",
)


@cache  # reading a package's metadata takes milliseconds, and a run does so four times
def _version(package: str) -> str:
    return version(package)


PHASES = {
    "load": "loading the model",
    "data": "reading and tokenizing the rows",
    "preflight": "checking rows and model",
    "reference": "computing the reference's log-probabilities",
    "samples": "generating completions",
    "drawing": "sampling completions",
    "held_out": "evaluating the held-out rows",
    "train": "training",
}
"""What a phase does, for a line in a long silence."""


@dataclass
class RunContext(Generic[SettingsT]):
    """A run's inputs (recipe, folder, machine) and outputs: log, resolved values, checks, times, run.json.

    Attributes:
        recipe: the validated recipe.
        run: the run directory.
        console: receives the log.
        command: the command line, for run.json.
        hardware: device of this process.
        dist: rank and number of processes.
        signal_flag: set by SIGINT or SIGTERM while the run is recorded.
        resolved: recipe key -> value of an ``auto`` with its reason.
        seconds: wall time by phase.
        check_results: all checks so far, as in run.json.
        strategy: the distributed strategy, resolved before a model is loaded.
        schedule_part: the part of the learning rate schedule that this run covers.
        loading_contexts: contexts of sharded weights (ZeRO-3), open from loading until training begins.
        is_recording: whether run.json exists, so that checks are written to it at once.
        fitted: the settings with limits that fit the training rows; None before these are read.
        callbacks: the user's callbacks of the trainer.
        finish: whether the run ends at its last checkpoint, without a further step.
    """

    recipe: Recipe[SettingsT]
    run: RunDirectory
    console: Console
    command: str
    hardware: Hardware = field(default_factory=detect_hardware)
    dist: DistInfo = field(default_factory=dist_info)
    signal_flag: SignalFlag = field(default_factory=SignalFlag)
    resolved: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    check_results: list[dict[str, Any]] = field(default_factory=list)
    strategy: str = "single"
    schedule_part: SchedulePart = COMPLETE_SCHEDULE
    loading_contexts: ExitStack = field(default_factory=ExitStack)
    is_recording: bool = False
    fitted: SettingsT | None = None
    callbacks: Sequence[TrainerCallback] = ()
    finish: bool = False

    @property
    def settings(self) -> SettingsT:
        """Return the recipe's settings, fitted to the rows once these are read."""
        return self.recipe.settings if self.fitted is None else self.fitted

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions of Python and the libraries."""
        libraries = {name: _version(name) for name in RECORDED_PACKAGES}
        return {"python": platform.python_version(), "llm-align": __version__, **libraries}

    def describe_environment(self, precision: str) -> str:
        """Return precision, device, processes and library versions in one line."""
        libraries = ", ".join(f"{name} {self.versions[name]}" for name in ("torch", "transformers", "peft"))
        parallelism = (
            f", {self.dist.world_size} processes with {self.strategy}" if self.dist.world_size > 1 else ""
        )
        return f"{precision} on {self.hardware.device} ({self.hardware.name}){parallelism}; {libraries}"

    def log(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def resolve_auto(self, key: str, choice: tuple[Value, str]) -> Value:
        """Return a resolved value and record it with its reason, for recipe.yaml."""
        value, reason = choice
        self.resolved[key] = f"{value} ({reason})"
        return value

    def check(self, *results: CheckResult, error: type[UserError] = UserError) -> None:
        """Print and record check results; during the run they are written to run.json at once.

        Args:
            results: the results.
            error: the class of the error.

        Raises:
            UserError: a check failed.
        """
        for result in results:
            self.log(result.line())
        self.check_results += [result.record() for result in results]
        if self.is_recording:
            self.run.update(preflight=self.check_results)
        raise_if_failed(results, error)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's wall time to the record, and say what goes on if it takes long."""
        start = time.monotonic()
        # A terminal has a progress bar for the steps.
        text = "" if phase == "train" and self.console.is_terminal else PHASES.get(phase, "")
        try:
            with working(self.console, text):
                yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    def raise_if_interrupted(self, where: str) -> None:
        """Raise Interrupted on all ranks if a signal reached any; a collective, every rank must call it."""
        if collectives.any_rank(bool(self.signal_flag.signal_name)):
            # A signal may reach one rank only; its name is reported by all.
            name = next(filter(None, collectives.all_gather_object(self.signal_flag.signal_name)))
            kind = OutputClosed if name == CLOSED_OUTPUT else Interrupted
            raise kind(f"stopped by {name} {where}. Run the same command to resume")

    @contextmanager
    def recorded(self, metadata: Mapping[str, Any], metric_spec: MetricSpec) -> Iterator[None]:
        """Lock the folder, write run.json and the final status.

        Args:
            metadata: initial sections of run.json.
            metric_spec: the metrics of the summary and the report.

        Raises:
            Interrupted: a signal came.
            NotFiniteError: loss or gradient is NaN or infinite.
            StorageError: the disk is full or read-only, or the folder is gone.
            UserError: a check failed during the run.
            LibraryError: a library raised an exception.
        """
        collectives.barrier()  # every rank has read the folder before rank 0 changes it
        with (
            self.run.locked(),
            catch_signals() as self.signal_flag,
            when_lost(self.console, self.signal_flag.output_closed),
        ):
            if self.run.replaced:
                self.run.clear()
            try:
                with writing_inside(self.run.path), run_errors(self.dist.world_size):
                    curves = {"curves": dict(metric_spec.logged_keys)}  # titles, for `llm-align compare`
                    self._write_initial_record({**metadata, **curves})
                    collectives.barrier()  # no rank may read a file of a replaced run
                    self.is_recording = True
                    CALLS.clear()  # those of the checks before
                    yield
                    self._write_final_record(metric_spec)
            except Interrupted as stop:
                is_closed = isinstance(stop, OutputClosed)
                self.run.update(status=STOPPED if is_closed else "interrupted")
                raise
            except StorageError as error:
                self.run.record_stop(error)
                raise
            except UserFunctionError as error:
                self.run.update(status="failed", error=str(error))
                raise UserFunctionError(
                    [replace(problem, repair=_resume_repair(problem.repair)) for problem in error.problems]
                ) from error
            except (NotFiniteError, UserError) as error:
                self.run.update(status="failed", error=str(error))
                raise
        collectives.barrier()  # no rank may use the result before rank 0 has finished it

    def _write_initial_record(self, metadata: Mapping[str, Any]) -> None:
        for note in [*self.recipe.notes, *([self.run.note] if self.run.note else [])]:
            self.log(note)
        parent = parent_run_record(self.recipe.settings)
        longer = self._longer_sections()
        # Those of an earlier start.
        for key in ("error", "cause", "finished", "finished_early"):
            self.run.record.pop(key, None)
        if self.run.is_writer and (self.run.path / MERGED).is_dir():
            merge = command_line("merge", self.run.path)
            self.log(f"{MERGED}/ has the weights of an earlier step: `{merge}` renews it after this run")
        self.run.update(
            format=FORMAT,
            status="running",
            stage=self.recipe.stage,
            recipe=self.recipe.name,
            digest=self.run.digest,
            fingerprint=self.run.fingerprint,
            command=self.command,
            seed=self.recipe.settings.train.seed,
            # A resumed run keeps the time of its first start.
            started=self.run.record.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            versions=self.versions,
            hardware={"device": self.hardware.device, "name": self.hardware.name},
            processes=self.dist.world_size,
            preflight=self.check_results,
            limits=limit_keys(self.recipe.settings),
            **({"init_from": parent} if parent is not None else {}),
            **self._code_sections(),
            **longer,
            **metadata,
        )
        if self.run.is_writer:
            stored = replace(self.recipe, settings=store_rows(self.recipe.settings, self.run.path))
            self.run.write("recipe.yaml", stored.to_yaml(self.resolved))

    def _code_sections(self) -> dict[str, Any]:
        """Return run.json's sections on the code of user functions, and log a change that was accepted."""
        digests, change = function_digests(self.recipe.settings), self.run.code_change
        sections: dict[str, Any] = {"functions": digests} if digests else {}
        if change is not None:
            step = max(complete_steps(self.run.checkpoints), default=0)
            self.log(f"changed code accepted after step {step}: {change.files}")
            entry = change.record(step=step, digest=self.run.digest)
            sections["code_changes"] = [*self.run.record.get("code_changes", []), entry]
        return sections

    def _longer_sections(self) -> dict[str, Any]:
        """Return run.json's section on earlier lengths of a run that is trained longer."""
        if self.run.longer is None:
            return {}
        entry = self.run.longer.record_entry()
        return {"trained_longer": [*self.run.record.get("trained_longer", []), entry]}

    def _write_final_record(self, metric_spec: MetricSpec) -> None:
        """Write the report, then the status ``finished``: last, so that a kill leaves no incomplete run."""
        seconds = {phase: round(value, 2) for phase, value in self.seconds.items()}
        # The largest peak decides whether a run fits, and ranks differ.
        peaks = collectives.all_gather_object(peak_memory_bytes(self.hardware))
        self.run.record |= {
            "status": "finished",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "peak_memory_bytes": max(peaks),
        }
        if call_times := merge_call_times(collectives.all_gather_object(CALLS.times)):
            self.run.record["function_calls"] = call_times
        self.run.record["summary"] = run_summary(self.run.record, metric_spec.summary)
        if self.dist.is_main:
            for folder in (self.run.path / "adapter", self.run.path / "model"):
                if folder.is_dir():
                    write_model_card(folder, self.run.record)
            write_report(self.run, metric_spec.logged_keys, metric_spec.diagnostics(self.run.record))
        self.run.update(status="finished")
        collectives.barrier()  # no rank exits before the folder is complete


def _resume_repair(repair: str) -> str:
    """Return the repair of a user function that failed during the run: the run need not start over."""
    return f"{repair or 'correct the function'}; {ACCEPT_REPAIR}"
