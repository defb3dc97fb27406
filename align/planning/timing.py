"""Training time: measured by an earlier run on this machine, or estimated from FLOPs."""

from align.planning.work import Work
from finetune.planning.devices import Device
from finetune.planning.speed import (
    Seconds,
    drawn_seconds,
    launch_seconds,
    learnt_operations,
    read_operations,
    step_seconds,
)
from finetune.planning.workload import Workload
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import FINISHED, RUNS, read_record

COUNTED = ("sft", "pretrain", "hindsight", "reward", "dpo")
"""Stages that record tokens per second and do nothing else while training (no generation)."""
MUCH = 0.3
"""Share of the time above which kernel launches are mentioned."""
LONG_ENOUGH = 30.0
"""Minimum seconds of training for a usable rate: the first steps are checked, and slower."""
UNLIKE = 0.25
"""Relative spread between the rates of two runs on the same base: other rows, another adapter."""


def seconds(
    recipe: Recipe, step: Workload, device: Device, *, done: Work | None, trained: int, base: int
) -> Seconds | None:
    """Return the training time of a recipe, without loading and evaluation.

    Args:
        recipe: the recipe.
        workload: one optimizer step of a process.
        device: the device of each process.
        work: of the full run.
        trainable: number of trainable parameters.
        base_bytes: bytes of the base's weights.
    """
    if done is None:
        return None
    if rates := _measured(recipe, step, device):
        # The spread covers other row lengths and adapters on the same base.
        slow, quick = min(rates.values()) * (1 - UNLIKE), max(rates.values()) * (1 + UNLIKE)
        names = ", ".join(rates)
        how = f"measured: {min(rates.values()):,.0f} tokens/s in {names}, give or take {UNLIKE:.0%}"
        return Seconds(done.learnt / quick, done.learnt / slow, how)
    return _computed(step, device, done=done, trained=trained, base=base)


def _computed(step: Workload, device: Device, *, done: Work, trained: int, base: int) -> Seconds | None:
    operations = done.learnt * learnt_operations(step, trained) + done.read * read_operations(step)
    training = step_seconds(step, device, operations=operations)
    if training is None:
        return None
    passes = done.steps * step.accumulated
    launching = launch_seconds(step, passes=passes)
    # At best kernel launches overlap with computation, at worst they add up.
    least, most = max(training[0], launching[0]), training[1] + launching[1]
    slow, quick = device.used
    peak = f"{device.peak(step.precision) / 1e12:,.3g} TFLOP/s"
    how = f"estimated: {slow:.0%} to {quick:.0%} of this device's peak of {peak}"
    if launching[1] > MUCH * training[1]:
        how += f", plus kernel launches of {passes:,} small micro-batches"
    if done.replies:
        drawing = drawn_seconds(step, device, replies=done.replies, base_bytes=base)
        if drawing is None:
            return None
        least, most = least + drawing[0], most + drawing[1]
        how += f", plus {done.replies:,} completions of up to {done.reply} tokens"
    return Seconds(least, most, how)


def _measured(recipe: Recipe, step: Workload, device: Device) -> dict[str, float]:
    """Return the tokens/s of finished runs with this stage, base and kind of device, by run."""
    # A recorded rate is that of one process, and says nothing about communication.
    if recipe.stage not in COUNTED or step.processes > 1:
        return {}
    wanted = (recipe.stage, recipe.settings.model.base, step.quantization, step.precision, device.kind)
    found = {}
    for folder in sorted(RUNS.glob(f"{recipe.stage}-*/")):
        record = read_record(folder)
        if record.get("status") != FINISHED:
            continue
        load, hardware = record.get("load", {}), record.get("hardware", {})
        held = (
            record.get("stage"),
            load.get("model", {}).get("base"),
            load.get("quantization"),
            load.get("precision"),
            hardware.get("device"),
        )
        rate = record.get("metrics", {}).get("tokens_per_second")
        if record.get("seconds", {}).get("train", 0.0) < LONG_ENOUGH:
            continue
        if held == wanted and rate and (device.kind == "cpu" or device.name in hardware.get("name", "")):
            found[folder.name] = float(rate)
    return found
