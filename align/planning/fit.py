"""``plan --fit``: alternative settings with peak memory and relative time, the cheapest that fits first.

A change costs time, or it changes training itself. The kinds of changes, in order of their price:

* Smaller micro-batches with more accumulation: the same numbers, in the same time as long as a micro-batch
  keeps the device busy. Every alternative takes the largest micro-batch that fits.
* ZeRO-1 and ZeRO-2 communicate as much as plain data parallelism (arXiv 1910.02054, section 7); ZeRO-3 and
  FSDP2 1.5 times as much.
* Gradient checkpointing computes one more forward pass: 6 P in place of 4 P for an adapter, 8 P in place of
  6 P for full fine-tuning (``finetune/planning/speed.py``).
* 16-bit dtypes in place of float32 (float16 on GPUs without bfloat16) are faster, not slower.
* 8-bit AdamW states (arXiv 2110.02861), 4-bit weights under an adapter (arXiv 2305.14314): other rounding.
* Fewer completions sampled in parallel read the weights more often.
* Offloading sends what is sharded over the bus in every step.
* Shorter rows, and fewer completions per step of TRL's trainers, which sample all of them at once, change
  what is trained on: they come last, however fast they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean
from typing import Any

from align.online.settings import OnlineSettings
from align.planning.plan import Plan, least_rows, plan_of
from align.rl.settings import PromptSettings
from finetune.planning.caches import cache_bytes
from finetune.planning.solver import Machine, combination_of, judge
from finetune.planning.speed import DEQUANTIZED, drawn_seconds, learnt_operations
from finetune.planning.workload import Workload
from finetune.recipe.checks import adapter_traits
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings

SENT = {"zero3": 1.25, "fsdp2": 1.25}
"""Slow-down: half of the extra communication of ZeRO-3 is assumed to overlap with computation."""
BUS = 12e9
"""Bytes/s between GPU and host memory: PCIe 4.0 x16 as reached in practice."""
USUAL = 100e12
"""FLOP/s assumed for an unknown GPU, to weigh communication against computation."""
SHORTEST = 128
"""Row lengths in tokens below which nothing is proposed."""
LEARNS_OTHER = ("data.max_length", "data.max_prompt_length", "sampling.max_new_tokens", "train.batch_size")
Change = tuple[str, Any]


@dataclass(frozen=True)
class Alternative:
    """A change of the recipe.

    Attributes:
        changes: the settings, with their values.
        plan: of the changed recipe.
        relative_time: its time over that of the unchanged recipe.
    """

    changes: tuple[Change, ...]
    plan: Plan
    time: float

    @property
    def words(self) -> str:
        """Return the overrides to append to the command."""
        return " ".join(f"{key}={_written(value)}" for key, value in self.changes)

    @property
    def learns_other(self) -> bool:
        """Return whether training changes: rows are truncated further, or a step has fewer of them."""
        return any(key in LEARNS_OTHER for key, _ in self.changes)


def alternatives(plan: Plan, count: int) -> list[Alternative]:
    """Return alternative settings, those that fit first, the cheapest of them first.

    Args:
        plan: the recipe as it is.
        count: GPUs of the machine.

    Raises:
        UserError: a changed recipe that cannot be planned.
    """
    works = (changes for changes in _combinations(plan) if _go_together(plan, changes))
    found = [_alternative(plan, changes, count) for changes in works]
    return sorted(
        found,
        key=lambda one: (
            # Those that fit, those that train the same, then by time, or by peak memory where nothing fits.
            not one.plan.fits,
            one.learns_other,
            round(one.time, 2) if one.plan.fits else one.plan.peak.total,
            len(one.changes),
            one.plan.peak.total,
        ),
    )


def _go_together(plan: Plan, changes: tuple[Change, ...]) -> bool:
    """Return whether the changed settings are compatible as they are."""
    device, processes = plan.device, plan.step.processes
    # The resolved strategy, since auto would hide an incompatibility.
    recipe = changed(plan.recipe, [("train.strategy", plan.step.strategy), *changes])
    machine = Machine(device.kind, device.bfloat16, processes)
    return judge(combination_of(recipe, machine)).kind == "works"


def _alternative(plan: Plan, changes: tuple[Change, ...], count: int) -> Alternative:
    recipe = changed(plan.recipe, changes)
    other = plan_of(recipe, plan.device, count, known=plan)
    return Alternative(changes, other, _price(other) / _price(plan))


def changed(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    """Return a recipe with other values."""
    settings = recipe.settings
    for key, value in changes:
        section, name = key.split(".")
        part = dict(settings)[section].model_copy(update={name: value})
        settings = settings.model_copy(update={section: part})
    return replace(recipe, settings=settings)


def _combinations(plan: Plan) -> Iterator[tuple[Change, ...]]:
    """Yield every combination of one change per kind, except the unchanged recipe."""
    settings = plan.recipe.settings
    kinds = [_rows(plan), _halved(plan), _recomputed(settings), _stored(settings, plan)]
    kinds += [_shared(plan), _drawn(plan), _cut(plan)]
    for choice in product(*kinds):
        changes = tuple(change for part in choice for change in part)
        if changes:
            yield changes


def _rows(plan: Plan) -> list[list[Change]]:
    """Return micro-batch sizes: on a GPU auto, which is the largest that fits; on a CPU smaller ones."""
    if plan.device.kind == "cpu":
        least = least_rows(plan.recipe.settings)
        fewer = sorted({max(least, plan.rows // 4), least} - {plan.rows}, reverse=True)
        return [[], *([("train.micro_batch_size", rows)] for rows in fewer)]
    asked = plan.recipe.settings.train.micro_batch_size
    return [[]] if asked == "auto" else [[("train.micro_batch_size", "auto")]]


def _halved(plan: Plan) -> list[list[Change]]:
    """Return 16-bit precision in place of float32: bfloat16 where the GPU supports it, else float16."""
    if plan.device.kind == "cpu" or plan.step.precision != "float32":
        return [[]]
    return [[], [("model.precision", "bfloat16" if plan.device.bfloat16 else "float16")]]


def _recomputed(settings: StageSettings) -> list[list[Change]]:
    possible = adapter_traits(settings.adapter.method).checkpointing
    if settings.train.gradient_checkpointing or not possible:
        return [[]]
    return [[], [("train.gradient_checkpointing", True)]]


def _stored(settings: StageSettings, plan: Plan) -> list[list[Change]]:
    traits = adapter_traits(settings.adapter.method)
    if traits.whole_model and settings.train.optimizer == "adamw":
        return [[], [("train.optimizer", "adamw_8bit")]]
    if "nf4" in traits.quantization and plan.step.quantization != "nf4":
        return [[], [("model.quantization", "nf4")]]
    return [[]]


def _shared(plan: Plan) -> list[list[Change]]:
    """Return the strategies that shard more than the recipe's, with several processes."""
    if plan.step.processes == 1:
        return [[]]
    order = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    here = order.index(plan.step.strategy) if plan.step.strategy in order else len(order)
    more: list[list[Change]] = [[("train.strategy", name)] for name in order[here + 1 :]]
    # Offloading alone is ZeRO's, and saves most with sharded weights.
    offloaded: list[list[Change]] = [[("train.strategy", "zero3"), ("train.offload", "cpu")]]
    return [[], *more, *(offloaded if plan.step.offload == "none" else [])]


def _drawn(plan: Plan) -> list[list[Change]]:
    """Return smaller generation batches: their KV cache takes half of the memory left by the weights."""
    asked, settings = plan.step.rollout, plan.recipe.settings
    if asked is None or isinstance(settings, OnlineSettings):
        return [[]]
    each = cache_bytes(plan.step) // asked.lines
    # The first phase is loading: what it leaves is free for caches.
    left = plan.room - plan.phases[0].total
    lines = max(1, left // 2 // each)
    here = asked.lines * plan.step.processes
    # If not even the weights fit, other changes have to free the memory first.
    found = [lines, lines // 4] if left > 0 else [8]
    return [[], *([("sampling.at_once", some * plan.step.processes)] for some in found if 0 < some < here)]


def _cut(plan: Plan) -> list[list[Change]]:
    """Return rows of a half or a quarter of the length (prompts and completions too), or smaller batches."""
    settings = plan.recipe.settings
    found: list[list[Change]] = [[]]
    if isinstance(settings, OnlineSettings):
        # TRL samples the full batch at once, and a batch cannot be smaller than one group.
        sizes = (settings.train.batch_size // part for part in (2, 4, 8, 16))
        return [[], *([("train.batch_size", size)] for size in sizes if size >= settings.sampling.samples)]
    for part in (2, 4):
        most = plan.step.columns // part
        if isinstance(settings.data, PromptSettings):
            reply = int(dict(settings)["sampling"].max_new_tokens) // part
            if reply >= SHORTEST // part:
                prompt = max(2, plan.lengths.longest_prompt // part)
                found.append([("data.max_prompt_length", prompt), ("sampling.max_new_tokens", reply)])
        elif plan.lengths.longest // part >= SHORTEST and most:
            found.append([("data.max_length", plan.lengths.longest // part)])
    return found


def _price(plan: Plan) -> float:
    """Return the seconds per trained token, up to a factor that all alternatives of a plan share."""
    step, peak = plan.step, plan.device.peak(plan.step.precision) or USUAL
    stored = fmean(DEQUANTIZED) if step.quantization != "none" else 1.0
    arithmetic = learnt_operations(step, plan.trained) / (fmean(plan.device.used) * peak) * stored
    return arithmetic * SENT.get(step.strategy, 1.0) + _bus_seconds(step, plan.trained) + _drawing(plan)


def _drawing(plan: Plan) -> float:
    """Return the generation seconds per trained token."""
    done, base = plan.work, plan.phases[0].parts["base"]
    if done is None or not done.replies:
        return 0.0
    spent = drawn_seconds(plan.step, plan.device, replies=done.replies, base_bytes=base)
    return 0.0 if spent is None else fmean(spent) / done.learnt


def _bus_seconds(step: Workload, trained: int) -> float:
    """Return the seconds per token to transfer offloaded state over the bus.

    Gradients go to the host and weights come back once per step; with ZeRO-3 each process also fetches its
    shard of the weights for the forward pass, and for the backward pass.
    """
    if step.offload == "none":
        return 0.0
    tokens = step.tokens * step.accumulated
    # float32 gradients out and float32 weights back.
    own = 8 * trained / step.processes
    # The weights, for the forward and the backward pass of every micro-batch.
    passes = 2 * step.accumulated * step.architecture.parameters * step.bytes / step.processes
    return (own + (passes if step.strategy == "zero3" else 0.0)) / BUS / tokens


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
