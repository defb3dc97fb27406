"""RunContext: a run's recipe, folder, console, resolved settings, checks, record and training."""

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

from finetune.distributed import collectives, sharding
from finetune.distributed.full_checkpoint import FullStateCheckpoint, check_resharding
from finetune.distributed.hardware import Hardware, detect_hardware, peak_memory_bytes
from finetune.distributed.interrupts import Interrupted, NotFiniteError, SignalFlag, catch_signals
from finetune.distributed.rank import DistInfo, dist_info
from finetune.distributed.strategies import REPLICATED, SHARDED_WEIGHTS, ZERO_STAGES
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import FORMAT
from finetune.training import auto_values, checkpoints
from finetune.training.base_trainer import first_row_ids, initial_param_groups
from finetune.training.metric_specs import SUPERVISED_METRICS, MetricSpec
from finetune.training.preflight.base_weights_check import check_base_unchanged, frozen_checksums
from finetune.training.preflight.checks import CheckResult, raise_if_failed
from finetune.training.preflight.first_steps import FirstStepsCheck
from finetune.training.preflight.replica_check import check_replicas_equal, trained_digest
from finetune.training.preflight.sharding_check import ShardingCheck
from finetune.training.recorder import AlreadyTrained, Recorder
from finetune.training.report import write_report
from finetune.training.run_directory import RunDirectory
from finetune.training.run_fingerprint import parent_run_record

Value = TypeVar("Value")
RECORDED_PACKAGES = (
    "llm-align",
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


@dataclass
class RunContext:
    """The state of a running stage: settings, output, distribution, checks and record."""

    recipe: Recipe
    run: RunDirectory
    console: Console
    command: str
    metric_spec: MetricSpec = SUPERVISED_METRICS
    hardware: Hardware = field(default_factory=detect_hardware)
    dist: DistInfo = field(default_factory=dist_info)
    signal_flag: SignalFlag = field(default_factory=SignalFlag)
    resolved: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    check_results: list[dict[str, Any]] = field(default_factory=list)
    strategy: str = "single"
    pre_training_contexts: ExitStack = field(default_factory=ExitStack)
    recording: bool = False
    allows_zero_gradients: bool = False
    """Whether a step may have zero gradients: e.g. completions of equal reward have no advantage."""

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions of Python and the libraries."""
        return {"python": platform.python_version(), **{name: _version(name) for name in RECORDED_PACKAGES}}

    def describe_environment(self, precision: str) -> str:
        """Return precision, device, processes and library versions in one line."""
        libraries = ", ".join(f"{name} {self.versions[name]}" for name in ("torch", "transformers", "peft"))
        parallelism = (
            f", {self.dist.world_size} processes with {self.strategy}" if self.dist.world_size > 1 else ""
        )
        return f"{precision} on {self.hardware.device} ({self.hardware.name}){parallelism}; {libraries}"

    def log(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def add_summary_metrics(self, summary: Mapping[str, tuple[str, str]]) -> None:
        """Add before/after metrics to the report's summary: metric -> (label, format)."""
        self.metric_spec = replace(self.metric_spec, summary={**self.metric_spec.summary, **summary})

    def init_distributed(self) -> None:
        """Resolve the strategy and initialize the process group; called before a model is loaded."""
        train, world_size = self.recipe.settings.train, self.dist.world_size
        self.strategy = self.resolve_auto("train.strategy", auto_values.strategy(train.strategy, world_size))
        if train.num_processes != world_size:
            self.resolve_auto("train.num_processes", (world_size, "set by the launcher"))
        collectives.init_distributed(self.hardware.device, deepspeed=self.strategy in ZERO_STAGES)

    def shard_on_load(self, dtype: str) -> None:
        """Load models sharded until training begins (ZeRO-3); FSDP2 shards in ``from_pretrained``."""
        if self.strategy == "zero3":
            self.pre_training_contexts.enter_context(
                sharding.zero3_init(dtype, offload=self.recipe.settings.train.offload, folder=self.run.path)
            )

    def enable_sharded_inference(self, model: nn.Module, base: PreTrainedModel) -> None:
        """Allow forward passes of a ZeRO-3 model until its trainer takes over."""
        if self.strategy == "zero3":
            offload = self.recipe.settings.train.offload
            self.pre_training_contexts.enter_context(
                sharding.zero3_inference_engine(model, base, offload=offload, folder=self.run.path)
            )

    def resolve_auto(self, key: str, choice: tuple[Value, str]) -> Value:
        """Return a resolved value and record it with its reason, for recipe.yaml."""
        value, reason = choice
        self.resolved[key] = f"{value} ({reason})"
        return value

    def check(self, *results: CheckResult) -> None:
        """Print and record check results; during the run they are written to run.json at once.

        Raises:
            UserError: a check failed.
        """
        for result in results:
            self.log(result.line())
        self.check_results += [result.record() for result in results]
        if self.recording:
            self.run.update(preflight=self.check_results)
        raise_if_failed(results)

    @contextmanager
    def recorded(self, **metadata: Any) -> Iterator[None]:
        """Lock the folder, write run.json and the final status; ``metadata`` are sections of run.json.

        Raises:
            Interrupted: a signal came.
            NotFiniteError: loss or gradient is NaN or infinite.
            UserError: a check failed during the run.
        """
        collectives.barrier()  # every rank has read the folder before rank 0 changes it
        with self.run.locked(), catch_signals() as self.signal_flag:
            if self.run.replaced:
                self.run.clear()
            self._write_initial_record(metadata)
            collectives.barrier()  # no rank may read a file of a replaced run
            self.recording = True
            try:
                yield
            except Interrupted:
                self.run.update(status="interrupted")
                raise
            except (NotFiniteError, UserError) as error:
                self.run.update(status="failed", error=str(error))
                raise
            self._write_final_record()
        collectives.barrier()  # no rank may use the result before rank 0 has finished it

    def fit(self, trainer: Trainer) -> None:
        """Train to the last step, resuming from the newest valid checkpoint.

        Raises:
            Interrupted: a signal came; a checkpoint was saved.
            NotFiniteError: loss or gradient is NaN or infinite.
            UserError: the adapter gets no gradient, or the frozen base changed.
        """
        # Rank 0 decides for all: it deletes corrupt checkpoints while the others would still look at them.
        last = collectives.broadcast_object(
            self._select_checkpoint() if self.dist.is_main else checkpoints.NO_CHECKPOINT
        )
        if last.path:
            check_resharding(last.path, strategy=self.strategy, num_processes=self.dist.world_size)
        self.run.truncate_after(last.step)
        if last.path:
            self.log(f"resuming from step {last.step}")
        recorder = Recorder(
            self.run, self.console, self.signal_flag, logged_keys=self.metric_spec.logged_keys
        )
        trainer.remove_callback(PrinterCallback)  # the recorder prints instead
        if self.strategy in (*ZERO_STAGES, *SHARDED_WEIGHTS):
            # Before the recorder, which writes the checksums of a complete checkpoint.
            trainer.add_callback(
                FullStateCheckpoint(partial(initial_param_groups, trainer), strategy=self.strategy)
            )
            trainer.add_callback(
                ShardingCheck(self.check, strategy=self.strategy, rows=partial(first_row_ids, trainer))
            )
        trainer.add_callback(recorder)
        uses_zero = self.strategy in ZERO_STAGES
        trainer.add_callback(
            FirstStepsCheck(
                self.check, allows_zero_gradients=self.allows_zero_gradients, engine_takes_gradients=uses_zero
            )
        )
        before = frozen_checksums(trainer.model)
        # ZeRO-3's inference engine is destroyed before DeepSpeed wraps the model for training.
        self.pre_training_contexts.close()
        with self.timed("train"):
            try:
                trainer.train(resume_from_checkpoint=str(last.path) if last.path else None)
            except AlreadyTrained:
                self.log("training already complete")
            finally:
                recorder.progress.stop()
        # After a signal the trainer returns as if it had finished: the checks below are for a trained model.
        self.raise_if_interrupted(f"at step {trainer.state.global_step}; checkpoint saved")
        self.check(check_base_unchanged(before, frozen_checksums(trainer.model)))
        if self.strategy in REPLICATED:
            self.check(check_replicas_equal(collectives.all_gather_object(trained_digest(trainer.model))))

    def _select_checkpoint(self) -> checkpoints.LastCheckpoint:
        """Return the newest valid checkpoint, and delete the corrupt ones after it."""
        last = checkpoints.find_last_valid(self.run.checkpoints)
        for problem in last.corrupt:
            self.log(f"corrupt checkpoint, using the previous one: {problem}")
        checkpoints.remove_newer_than(self.run.checkpoints, last.step)
        return last

    def raise_if_interrupted(self, where: str) -> None:
        """Raise Interrupted on all ranks if a signal reached any; a collective, every rank must call it."""
        if collectives.any_rank(bool(self.signal_flag.signal_name)):
            # A signal may reach one rank only; its name is reported by all.
            name = next(filter(None, collectives.all_gather_object(self.signal_flag.signal_name)))
            raise Interrupted(f"stopped by {name} {where}. Run the same command to resume")

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's wall time to the record, under the phase's name."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    def _write_initial_record(self, metadata: dict[str, Any]) -> None:
        for note in self.recipe.notes:
            self.log(note)
        parent = parent_run_record(self.recipe.settings)
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
            **({"init_from": parent} if parent is not None else {}),
            **metadata,
        )
        self.run.write("recipe.yaml", self.recipe.to_yaml(self.resolved))

    def _write_final_record(self) -> None:
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
        self.run.record["summary"] = _summary(self.run.record, self.metric_spec.summary)
        if self.dist.is_main:
            write_report(
                self.run, self.metric_spec.logged_keys, self.metric_spec.diagnostics(self.run.record)
            )
        self.run.update(status="finished")
        collectives.barrier()  # no rank exits before the folder is complete


def _summary(record: dict[str, Any], summary_metrics: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return the summary of a run: label -> formatted value."""
    metrics, parameters = record.get("metrics", {}), record["parameters"]
    share = parameters["trained"] / parameters["total"]
    summary = {"trained parameters": f"{parameters['trained']:,} ({share:.2%})"}
    for key, (label, style) in summary_metrics.items():
        if f"{key}_before" in metrics and f"{key}_after" in metrics:
            summary[label] = f"{metrics[f'{key}_before']:{style}} → {metrics[f'{key}_after']:{style}}"
    rate = f", {metrics['tokens_per_second']:,} tokens/s" if "tokens_per_second" in metrics else ""
    if "train" in record["seconds"]:  # absent if a run resumes after its last step
        summary["training"] = f"{record['seconds']['train']:.0f} s{rate}"
    summary["peak memory"] = f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"
    return summary
