"""RunContext: a run's recipe, folder, console, resolved settings, checks, record, training and shutdown."""

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer

from finetune.planning import choices
from finetune.planning.hardware import Hardware, detect, peak_memory_bytes
from finetune.planning.world import World, world
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe
from finetune.training import apart, checkpoints, processes
from finetune.training.base_trainer import first_rows, groups
from finetune.training.preflight.base import fingerprints, unchanged
from finetune.training.preflight.first_steps import FirstSteps
from finetune.training.preflight.parts import Parts
from finetune.training.preflight.same_weights import same_tick, trained_digest
from finetune.training.preflight.ticks import Tick, refuse
from finetune.training.recorder import Recorder, TrainedAlready
from finetune.training.report import write_report
from finetune.training.run_directory import RunDirectory
from finetune.training.run_fingerprint import start_record
from finetune.training.stops import Interrupt, Interrupted, NotFiniteError, listening
from finetune.training.strategies import APART, ZERO
from finetune.training.watched import SUPERVISED, Watched
from finetune.training.whole_checkpoint import WholeCheckpoint, refuse_other_parts

Value = TypeVar("Value")
PACKAGES = ("llm-align", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")

WHOLE_IN_EACH = ("ddp", "zero1", "zero2")
"""Strategies under which each rank holds all trained weights."""


@cache  # reading a library's metadata takes milliseconds, and a run asks four times
def _version(package: str) -> str:
    return version(package)


@dataclass
class Job:
    """The state of a running stage: settings, output, distribution, checks and record."""

    recipe: Recipe
    run: RunDirectory
    console: Console
    command: str
    watched: Watched = SUPERVISED
    hardware: Hardware = field(default_factory=detect)
    world: World = field(default_factory=world)
    interrupt: Interrupt = field(default_factory=Interrupt)
    derived: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    preflight: list[dict[str, Any]] = field(default_factory=list)
    strategy: str = "single"
    before_training: ExitStack = field(default_factory=ExitStack)
    under_way: bool = False
    may_idle: bool = False
    """Whether a step may have zero gradients: e.g. completions of equal reward have no advantage."""

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions of Python and the libraries."""
        return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}

    def environment(self, precision: str) -> str:
        """Return precision, device, processes and library versions in one line."""
        libraries = ", ".join(f"{name} {self.versions[name]}" for name in ("torch", "transformers", "peft"))
        shared = f", {self.world.size} processes with {self.strategy}" if self.world.size > 1 else ""
        return f"{precision} on {self.hardware.device} ({self.hardware.name}){shared}; {libraries}"

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def watch(self, numbers: Mapping[str, tuple[str, str]]) -> None:
        """Add before/after metrics to the report's summary: metric -> (label, format)."""
        self.watched = replace(self.watched, numbers={**self.watched.numbers, **numbers})

    def join(self) -> None:
        """Resolve the strategy and initialize the process group; called before a model is loaded.

        Raises:
            UserError: the strategy does not fit the number of processes.
        """
        asked, size = self.recipe.settings.train, self.world.size
        self.strategy = self.choose("train.strategy", choices.strategy(asked.strategy, size))
        if asked.processes != size:
            self.choose("train.processes", (size, "set by the launcher"))
        processes.join(self.hardware.device, deepspeed=self.strategy in ZERO)

    def load_in_parts(self, stored: str) -> None:
        """Load models sharded until training begins (ZeRO-3); FSDP2 shards in ``from_pretrained``."""
        if self.strategy == "zero3":
            self.before_training.enter_context(
                apart.loading(stored, offload=self.recipe.settings.train.offload, folder=self.run.path)
            )

    def let_compute(self, model: nn.Module, base: PreTrainedModel) -> None:
        """Allow forward passes of a ZeRO-3 model until its trainer takes over."""
        if self.strategy == "zero3":
            offload = self.recipe.settings.train.offload
            self.before_training.enter_context(
                apart.measuring(model, base, offload=offload, folder=self.run.path)
            )

    def choose(self, key: str, choice: tuple[Value, str]) -> Value:
        """Return a resolved value and record it with its reason, for recipe.yaml."""
        value, reason = choice
        self.derived[key] = f"{value} ({reason})"
        return value

    def check(self, *ticks: Tick) -> None:
        """Print and record check results; during the run they are written to run.json at once.

        Raises:
            UserError: a check failed.
        """
        for tick in ticks:
            self.say(tick.line())
        self.preflight += [tick.record() for tick in ticks]
        if self.under_way:
            self.run.update(preflight=self.preflight)
        refuse(ticks)

    @contextmanager
    def started(self, **facts: Any) -> Iterator[None]:
        """Lock the folder, write run.json and the final status; ``metadata`` are sections of run.json.

        Raises:
            Interrupted: a signal came.
            NotFiniteError: loss or gradient is NaN or infinite.
            UserError: a check failed during the run.
        """
        processes.wait()  # every rank has read the folder before rank 0 changes it
        with self.run.start(), listening() as self.interrupt:
            if self.run.replaced:
                self.run.clear()
            self._begin(facts)
            processes.wait()  # no rank may read a file of a replaced run
            self.under_way = True
            try:
                yield
            except Interrupted:
                self.run.update(status="interrupted")
                raise
            except (NotFiniteError, UserError) as error:
                self.run.update(status="failed", reason=str(error))
                raise
            self._finish()
        processes.wait()  # no rank may use the result before rank 0 has finished it

    def train(self, trainer: Trainer) -> None:
        """Train to the last step, resuming from the newest valid checkpoint.

        Raises:
            Interrupted: a signal came; a checkpoint was saved.
            NotFiniteError: loss or gradient is NaN or infinite.
            UserError: the adapter gets no gradient, or the frozen base changed.
        """
        found = processes.from_main(self._last_checkpoint() if self.world.main else checkpoints.NONE)
        if found.path:
            refuse_other_parts(found.path, strategy=self.strategy, processes=self.world.size)
        self.run.forget_after(found.step)
        if found.path:
            self.say(f"resuming from step {found.step}")
        recorder = Recorder(self.run, self.console, self.interrupt, logged=self.watched.logged)
        trainer.remove_callback(PrinterCallback)  # the recorder prints in its place
        if self.strategy in (*ZERO, *APART):
            # Before the recorder, which writes the checksums of a complete checkpoint.
            trainer.add_callback(WholeCheckpoint(partial(groups, trainer), strategy=self.strategy))
            trainer.add_callback(Parts(self.check, strategy=self.strategy, rows=partial(first_rows, trainer)))
        trainer.add_callback(recorder)
        zero = self.strategy in ZERO
        trainer.add_callback(FirstSteps(self.check, may_idle=self.may_idle, taken=zero))
        before = fingerprints(trainer.model)
        self.before_training.close()
        with self.timed("train"):
            try:
                trainer.train(resume_from_checkpoint=str(found.path) if found.path else None)
            except TrainedAlready:
                self.say("training already complete")
            finally:
                recorder.progress.stop()
        self.stop_if_asked(f"at step {trainer.state.global_step}; checkpoint saved")
        self.check(unchanged(before, fingerprints(trainer.model)))
        if self.strategy in WHOLE_IN_EACH:
            self.check(same_tick(processes.everyones(trained_digest(trainer.model))))

    def _last_checkpoint(self) -> checkpoints.Found:
        """Return the newest valid checkpoint, and delete the corrupt ones after it."""
        found = checkpoints.find_last(self.run.checkpoints)
        for line in found.damaged:
            self.say(f"corrupt checkpoint, using the previous one: {line}")
        checkpoints.remove_after(self.run.checkpoints, found.step)
        return found

    def stop_if_asked(self, where: str) -> None:
        """Raise Interrupted on all ranks if a signal reached any; a collective, every rank must call it."""
        if processes.anyones(bool(self.interrupt.name)):
            name = next(filter(None, processes.everyones(self.interrupt.name)))
            raise Interrupted(f"stopped by {name} {where}. Run the same command to resume")

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's wall time to the record, under the phase's name."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    def _begin(self, facts: dict[str, Any]) -> None:
        for note in self.recipe.notes:
            self.say(note)
        start = start_record(self.recipe.settings)
        self.run.update(
            status="running",
            stage=self.recipe.stage,
            recipe=self.recipe.name,
            digest=self.run.digest,
            fingerprint=self.run.fingerprint,
            command=self.command,
            seed=self.recipe.settings.train.seed,
            started=self.run.record.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            versions=self.versions,
            hardware={"device": self.hardware.device, "name": self.hardware.name},
            processes=self.world.size,
            preflight=self.preflight,
            **({"start": start} if start is not None else {}),
            **facts,
        )
        self.run.write("recipe.yaml", self.recipe.to_yaml(self.derived))

    def _finish(self) -> None:
        """Write the report, then the status ``finished``: last, so that a kill leaves no incomplete run."""
        seconds = {phase: round(value, 2) for phase, value in self.seconds.items()}
        peaks = processes.everyones(peak_memory_bytes(self.hardware))
        self.run.record |= {
            "status": "finished",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "peak_memory_bytes": max(peaks),
        }
        self.run.record["headline"] = _headline(self.run.record, self.watched.numbers)
        if self.world.main:
            write_report(self.run, self.watched.logged, self.watched.panel(self.run.record))
        self.run.update(status="finished")
        processes.wait()  # no rank exits before the folder is complete


def _headline(record: dict[str, Any], numbers: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return the summary of a run: label -> formatted value."""
    metrics, parameters = record.get("metrics", {}), record["parameters"]
    share = parameters["trained"] / parameters["total"]
    lines = {"trained parameters": f"{parameters['trained']:,} ({share:.2%})"}
    for key, (label, style) in numbers.items():
        if f"{key}_before" in metrics and f"{key}_after" in metrics:
            lines[label] = f"{metrics[f'{key}_before']:{style}} → {metrics[f'{key}_after']:{style}}"
    rate = f", {metrics['tokens_per_second']:,} tokens/s" if "tokens_per_second" in metrics else ""
    if "train" in record["seconds"]:  # absent if a run resumes after its last step
        lines["training"] = f"{record['seconds']['train']:.0f} s{rate}"
    lines["peak memory"] = f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"
    return lines
