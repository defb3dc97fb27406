"""The plan of a recipe: its memory by phase, work, time and disk, computed without loading anything."""

from dataclasses import dataclass, field, replace
from math import ceil

from align.planner.row_lengths import RowLengths, measure_lengths
from align.planner.stage_plans import StagePlan, WorkloadOfRows, stage_plan
from finetune.adapters import llama_adapter
from finetune.distributed.hardware import SAFE_FRACTION, Device
from finetune.planner.estimate import (
    Estimate,
    Phase,
    TimeEstimate,
    TotalWork,
    Workload,
    estimate,
    recipe_workload,
)
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.limits import fit_to_rows
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import list_runs
from finetune.recipe.settings import StageSettings
from finetune.training import auto_values

STAGES_WITH_TOKEN_RATE = ("sft", "pretrain", "chain_of_hindsight", "reward", "dpo")
"""Stages that record tokens per second and do nothing else while training (no generation)."""
MIN_TRAINING_SECONDS = 30.0
"""Minimum seconds of training for a usable rate: the first steps are checked, and slower."""
RATE_SPREAD = 0.25
"""Relative spread between the rates of two runs on the same base: other rows, another adapter."""


@dataclass(frozen=True)
class Plan:
    """The resources that a run of a recipe needs.

    Attributes:
        recipe: the planned recipe.
        stage: the stage-specific part of the plan.
        device: the device of each process.
        estimate: memory, parameters and speed of one optimizer step of one process.
        lengths: token lengths of the rows.
        work: steps and tokens of the full run; None if the number of rows is unknown.
        time: time of the full run; None if the speed or the number of rows is unknown.
        disk: bytes written, by kind.
        auto: values of settings that were ``auto``, with the reason for each.
        micro_batch_size: rows per micro-batch.
        workload_of_rows: returns the workload of a micro-batch with this number of rows.
    """

    recipe: Recipe
    stage: StagePlan
    device: Device
    estimate: Estimate
    lengths: RowLengths
    work: TotalWork | None
    time: TimeEstimate | None
    disk: dict[str, int]
    auto: dict[str, tuple[str, str]]
    micro_batch_size: int
    workload_of_rows: WorkloadOfRows = field(repr=False)

    @property
    def workload(self) -> Workload:
        """Return one optimizer step of one process."""
        return self.estimate.workload

    @property
    def peak(self) -> Phase:
        """Return the run's phase with the highest peak; a merge is a separate command."""
        return self.estimate.peak

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.available_bytes

    @property
    def available_bytes(self) -> int:
        """Return the device bytes available to a process."""
        return self.device.available_bytes_per_process(self.workload.processes)


def make_plan(recipe: Recipe, device: Device, count: int, *, reuse: Plan | None = None) -> Plan:
    """Return the plan of a recipe.

    Args:
        recipe: the recipe.
        device: the device of each process.
        count: how many of them the machine has.
        reuse: a plan with the same base and data, to avoid reading them again.

    Raises:
        UserError: an unknown base, a setting that the device does not support, mistakes in local data.
    """
    settings, stage = recipe.settings, stage_plan(recipe.stage, recipe.settings)
    hardware = device.hardware(count)
    model_values = auto_values.precision_and_quantization(settings, hardware)
    processes = auto_values.num_processes(settings.train.num_processes, hardware)
    strategy = auto_values.strategy(settings.train.strategy, processes[0])
    workload = recipe_workload(
        settings,
        precision=model_values["model.precision"][0],
        quantization=model_values["model.quantization"][0],
        device=device.kind,
        processes=processes[0],
        strategy=strategy[0],
        architecture=None if reuse is None else reuse.workload.architecture,
    )
    max_length = stage.max_length(workload.architecture.max_positions)
    lengths = reuse.lengths.truncated(max_length[0]) if reuse else _measure_rows(recipe, stage, max_length[0])
    recipe = _fitted(recipe, lengths)
    settings, stage = recipe.settings, stage_plan(recipe.stage, recipe.settings)

    def workload_of_rows(rows: int) -> Workload:
        micro_batches = ceil(settings.train.batch_size / (rows * workload.processes))
        return replace(stage.micro_batch(workload, lengths, rows), accumulation_steps=micro_batches)

    micro_batch_size = _micro_batch_size(stage, workload_of_rows, device, workload.processes)
    auto = {
        **model_values,
        "train.num_processes": (str(processes[0]), processes[1]),
        "train.strategy": strategy,
        stage.length_key: (str(max_length[0]), max_length[1]),
        "train.micro_batch_size": (str(micro_batch_size[0]), micro_batch_size[1]),
        **_generation_batch_size(settings, workload_of_rows(1)),
    }
    estimated = estimate(workload_of_rows(micro_batch_size[0]))
    _check_trainable(settings, estimated)
    work = stage.total_work(lengths)
    return Plan(
        recipe=recipe,
        stage=stage,
        device=device,
        estimate=estimated,
        lengths=lengths,
        work=work,
        time=None if work is None else _estimate_time(recipe, estimated, device, work),
        disk=estimated.disk_bytes(settings.train.keep_checkpoints),
        auto=auto,
        micro_batch_size=micro_batch_size[0],
        workload_of_rows=workload_of_rows,
    )


def _fitted(recipe: Recipe, lengths: RowLengths) -> Recipe:
    """Return the recipe with limits that fit the rows, and a note on each change, as its run would have."""
    if not lengths.rows:
        return recipe

    def steps_with(settings: StageSettings) -> int:
        work = stage_plan(recipe.stage, settings).total_work(lengths)
        assert work is not None, "the number of rows is known"
        return work.steps

    settings, changes = fit_to_rows(recipe.settings, lengths.rows, steps_with)
    notes = [*recipe.notes, *(change.line() for change in changes)]
    return replace(recipe, settings=settings, notes=notes)


def _measure_rows(recipe: Recipe, stage: StagePlan, max_length: int) -> RowLengths:
    settings = recipe.settings
    lengths = measure_lengths(
        settings.data,
        settings.model,
        seed=settings.train.seed,
        max_length=max_length,
        completions=stage.COMPLETIONS,
        labels=stage.LABELED,
    )
    return lengths.as_blocks(max_length) if stage.BLOCKS else lengths


def _generation_batch_size(settings: StageSettings, workload: Workload) -> dict[str, tuple[str, str]]:
    """Return the generation batch size over all processes, for stages that generate."""
    if workload.rollout is None:
        return {}
    requested, generation = dict(settings)["sampling"].generation_batch_size, workload.rollout
    positions = generation.prompt + generation.completion
    reason = "as requested" if requested != "auto" else f"prompt and completion have up to {positions} tokens"
    return {"sampling.generation_batch_size": (str(generation.rows * workload.processes), reason)}


def _check_trainable(settings: StageSettings, estimated: Estimate) -> None:
    """Raise UserError if the adapter does not support this base, with the message of a run."""
    workload = estimated.workload
    method, family = workload.adapter.method, workload.architecture.family
    actual = f"'{method}' on '{settings.model.base}', a model of type '{family}'"
    if method == "llama_adapter" and family not in llama_adapter.SUPPORTED_MODEL_TYPES:
        expected = f"a model of type {', '.join(llama_adapter.SUPPORTED_MODEL_TYPES)}"
        raise UserError(
            Problem("adapter.method", actual, expected, "adapter.method=prefix works on any of them")
        )
    if not estimated.trainable:
        repair = "adapter.method=ia3 or layernorm trains as few parameters and works on it"
        raise UserError(
            Problem("adapter.method", f"{actual}: nothing to train", "a base with bias terms", repair)
        )


def _micro_batch_size(
    stage: StagePlan, workload_of_rows: WorkloadOfRows, device: Device, processes: int
) -> tuple[int, str]:
    """Return the micro-batch size and its reason."""
    train = stage.settings.train

    def fits(rows: int) -> bool:
        # auto leaves a margin for the plan's error; a requested size is compared with the full memory.
        peak = estimate(workload_of_rows(rows)).micro_batch_peak
        return peak.total <= SAFE_FRACTION * device.available_bytes

    return auto_values.micro_batch_size(
        train.micro_batch_size,
        batch_size=ceil(train.batch_size / processes),
        # As the stage lays rows out: a prompt with all its completions may be one row.
        longest=workload_of_rows(1).seq_len,
        hardware=device.hardware(),
        must_divide=train.engine == "trl",
        min_rows=stage.MIN_ROWS,
        fits=fits if device.kind == "cuda" else None,
    )


def _estimate_time(
    recipe: Recipe, estimated: Estimate, device: Device, work: TotalWork
) -> TimeEstimate | None:
    """Return the time of a run: at the rate of earlier runs on this machine, or estimated from FLOPs."""
    if rates := _measured_rates(recipe, estimated.workload, device):
        # The spread covers other row lengths and adapters on the same base.
        slow, fast = min(rates.values()) * (1 - RATE_SPREAD), max(rates.values()) * (1 + RATE_SPREAD)
        names = ", ".join(rates)
        basis = f"measured: {min(rates.values()):,.0f} tokens/s in {names}, give or take {RATE_SPREAD:.0%}"
        return TimeEstimate(work.trained_tokens / fast, work.trained_tokens / slow, basis)
    return estimated.time(device, work)


def _measured_rates(recipe: Recipe, workload: Workload, device: Device) -> dict[str, float]:
    """Return the tokens/s of finished runs with this stage, base and kind of device, by run."""
    # A recorded rate is that of one process, and says nothing about communication.
    if recipe.stage not in STAGES_WITH_TOKEN_RATE or workload.processes > 1:
        return {}
    wanted = (
        recipe.stage,
        recipe.settings.model.base,
        workload.quantization,
        workload.precision,
        device.kind,
    )
    rates = {}
    for run in list_runs():
        if not run.is_finished:
            continue
        record = run.record
        load, hardware = record.get("reload", {}), record.get("hardware", {})
        recorded = (
            record.get("stage"),
            load.get("model", {}).get("base"),
            load.get("quantization"),
            load.get("precision"),
            hardware.get("device"),
        )
        rate = record.get("metrics", {}).get("tokens_per_second")
        if record.get("seconds", {}).get("train", 0.0) < MIN_TRAINING_SECONDS:
            continue
        if recorded == wanted and rate and (device.kind == "cpu" or device.name in hardware.get("name", "")):
            rates[run.path.name] = float(rate)
    return rates
