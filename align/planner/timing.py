"""Training time: measured by an earlier run on this machine, or estimated from FLOPs."""

from align.planner.work import TotalWork
from finetune.distributed.hardware import Device
from finetune.planner.speed import (
    TimeEstimate,
    compute_seconds,
    forward_flops,
    generation_seconds,
    launch_seconds,
    training_flops,
)
from finetune.planner.workload import Workload
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import FINISHED, RUNS_FOLDER, is_outdated, read_run_record

STAGES_WITH_TOKEN_RATE = ("sft", "pretrain", "chain_of_hindsight", "reward", "dpo")
"""Stages that record tokens per second and do nothing else while training (no generation)."""
NOTABLE_LAUNCH_FRACTION = 0.3
"""Share of the time above which kernel launches are mentioned."""
MIN_TRAINING_SECONDS = 30.0
"""Minimum seconds of training for a usable rate: the first steps are checked, and slower."""
RATE_SPREAD = 0.25
"""Relative spread between the rates of two runs on the same base: other rows, another adapter."""


def estimate_time(
    recipe: Recipe,
    workload: Workload,
    device: Device,
    *,
    work: TotalWork | None,
    trainable: int,
    base_bytes: int,
) -> TimeEstimate | None:
    """Return the training time of a recipe, without loading and evaluation.

    Args:
        recipe: the recipe.
        workload: one optimizer step of a process.
        device: the device of each process.
        work: of the full run.
        trainable: number of trainable parameters.
        base_bytes: bytes of the base's weights.
    """
    if work is None:
        return None
    if rates := _measured_rates(recipe, workload, device):
        # The spread covers other row lengths and adapters on the same base.
        slow, fast = min(rates.values()) * (1 - RATE_SPREAD), max(rates.values()) * (1 + RATE_SPREAD)
        names = ", ".join(rates)
        basis = f"measured: {min(rates.values()):,.0f} tokens/s in {names}, give or take {RATE_SPREAD:.0%}"
        return TimeEstimate(work.trained_tokens / fast, work.trained_tokens / slow, basis)
    return _estimated_time(workload, device, work=work, trainable=trainable, base_bytes=base_bytes)


def _estimated_time(
    workload: Workload, device: Device, *, work: TotalWork, trainable: int, base_bytes: int
) -> TimeEstimate | None:
    flops = work.trained_tokens * training_flops(workload, trainable) + work.forward_tokens * forward_flops(
        workload
    )
    training = compute_seconds(workload, device, flops=flops)
    if training is None:
        return None
    micro_batches = work.steps * workload.accumulation_steps
    launching = launch_seconds(workload, micro_batches=micro_batches)
    # At best kernel launches overlap with computation, at worst they add up.
    lower, upper = max(training[0], launching[0]), training[1] + launching[1]
    slow, fast = device.utilization
    peak = f"{device.peak_flops(workload.precision) / 1e12:,.3g} TFLOP/s"
    basis = f"estimated: {slow:.0%} to {fast:.0%} of this device's peak of {peak}"
    if launching[1] > NOTABLE_LAUNCH_FRACTION * training[1]:
        basis += f", plus kernel launches of {micro_batches:,} small micro-batches"
    if work.completions:
        generation = generation_seconds(workload, device, completions=work.completions, base_bytes=base_bytes)
        if generation is None:
            return None
        lower, upper = lower + generation[0], upper + generation[1]
        basis += f", plus {work.completions:,} completions of up to {work.completion_tokens} tokens"
    return TimeEstimate(lower, upper, basis)


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
    for folder in sorted(RUNS_FOLDER.glob(f"{recipe.stage}-*/")):
        record = read_run_record(folder)
        if record.get("status") != FINISHED or is_outdated(record):
            continue
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
            rates[folder.name] = float(rate)
    return rates
