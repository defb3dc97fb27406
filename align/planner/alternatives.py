"""``plan --fit``: alternative settings with peak memory and relative time, the cheapest that fits first.

A change costs time, or it changes training itself. The kinds of changes, in order of their price:

* Smaller micro-batches with more accumulation: the same numbers, in the same time as long as a micro-batch
  keeps the device busy. Every alternative takes the largest micro-batch that fits.
* ZeRO-1 and ZeRO-2 communicate as much as plain data parallelism (arXiv 1910.02054, section 7); ZeRO-3 and
  FSDP2 1.5 times as much.
* Gradient checkpointing computes one more forward pass: 6 P in place of 4 P for an adapter, 8 P in place of
  6 P for full fine-tuning (``finetune/planner/speed.py``).
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
from typing import Any

from align.planner.plan import Plan, make_plan
from finetune.distributed.solver import LaunchTarget, check, recipe_combination
from finetune.recipe.discovery import adapter_traits
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings

MIN_PROPOSED_LENGTH = 128
"""Row lengths in tokens below which nothing is proposed."""
TRAINING_KEYS = ("data.max_length", "data.max_prompt_length", "sampling.max_new_tokens", "train.batch_size")
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
    relative_time: float

    @property
    def overrides(self) -> str:
        """Return the overrides to append to the command."""
        return " ".join(f"{key}={_format_value(value)}" for key, value in self.changes)

    @property
    def changes_training(self) -> bool:
        """Return whether training changes: rows are truncated further, or a step has fewer of them."""
        return any(key in TRAINING_KEYS for key, _ in self.changes)


def find_alternatives(plan: Plan, count: int) -> list[Alternative]:
    """Return alternative settings, those that fit first, the cheapest of them first.

    Args:
        plan: the recipe as it is.
        count: GPUs of the machine.

    Raises:
        UserError: a changed recipe that cannot be planned.
    """
    compatible = (changes for changes in _change_combinations(plan) if _are_compatible(plan, changes))
    alternatives = [_plan_alternative(plan, changes, count) for changes in compatible]
    return sorted(
        alternatives,
        key=lambda alternative: (
            # Those that fit, those that train the same, then by time, or by peak memory where nothing fits.
            # Rounded times: among nearly equal ones the fewest changes win.
            not alternative.plan.fits,
            alternative.changes_training,
            round(alternative.relative_time, 2) if alternative.plan.fits else alternative.plan.peak.total,
            len(alternative.changes),
            alternative.plan.peak.total,
        ),
    )


def _are_compatible(plan: Plan, changes: tuple[Change, ...]) -> bool:
    """Return whether the changed settings are compatible as they are."""
    device, processes = plan.device, plan.workload.processes
    # The resolved strategy, since auto would hide an incompatibility.
    recipe = apply_changes(plan.recipe, [("train.strategy", plan.workload.strategy), *changes])
    target = LaunchTarget(device.kind, device.bfloat16, processes)
    return check(recipe_combination(recipe, target)).kind == "works"


def _plan_alternative(plan: Plan, changes: tuple[Change, ...], count: int) -> Alternative:
    recipe = apply_changes(plan.recipe, changes)
    # reuse: config.json and data are read once for all alternatives.
    alternative_plan = make_plan(recipe, plan.device, count, reuse=plan)
    return Alternative(
        changes, alternative_plan, _seconds_per_token(alternative_plan) / _seconds_per_token(plan)
    )


def apply_changes(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    """Return a recipe with other values."""
    settings = recipe.settings
    for key, value in changes:
        section, name = key.split(".")
        section_settings = dict(settings)[section].model_copy(update={name: value})
        settings = settings.model_copy(update={section: section_settings})
    return replace(recipe, settings=settings)


def _change_combinations(plan: Plan) -> Iterator[tuple[Change, ...]]:
    """Yield every combination of one change per kind, except the unchanged recipe."""
    settings = plan.recipe.settings
    changes_by_kind = [
        _micro_batch_changes(plan),
        _precision_changes(plan),
        _checkpointing_changes(settings),
        _storage_changes(settings, plan),
    ]
    changes_by_kind += [_strategy_changes(plan), _fewer_parallel_samples(plan), _shorter_rows(plan)]
    for choice in product(*changes_by_kind):
        changes = tuple(change for kind_changes in choice for change in kind_changes)
        if changes:
            yield changes


def _micro_batch_changes(plan: Plan) -> list[list[Change]]:
    """Return micro-batch sizes: on a GPU auto, which is the largest that fits; on a CPU smaller ones."""
    if plan.device.kind == "cpu":
        minimum = plan.stage.MIN_ROWS
        fewer = sorted(
            {max(minimum, plan.micro_batch_size // 4), minimum} - {plan.micro_batch_size}, reverse=True
        )
        return [[], *([("train.micro_batch_size", rows)] for rows in fewer)]
    requested = plan.recipe.settings.train.micro_batch_size
    return [[]] if requested == "auto" else [[("train.micro_batch_size", "auto")]]


def _precision_changes(plan: Plan) -> list[list[Change]]:
    """Return 16-bit precision in place of float32: bfloat16 where the GPU supports it, else float16."""
    if plan.device.kind == "cpu" or plan.workload.precision != "float32":
        return [[]]
    return [[], [("model.precision", "bfloat16" if plan.device.bfloat16 else "float16")]]


def _checkpointing_changes(settings: StageSettings) -> list[list[Change]]:
    supported = adapter_traits(settings.adapter.method).gradient_checkpointing
    if settings.train.gradient_checkpointing or not supported:
        return [[]]
    return [[], [("train.gradient_checkpointing", True)]]


def _storage_changes(settings: StageSettings, plan: Plan) -> list[list[Change]]:
    traits = adapter_traits(settings.adapter.method)
    # The largest static memory: optimizer states under full tuning, the frozen base under an adapter.
    if traits.full_finetuning and settings.train.optimizer == "adamw":
        return [[], [("train.optimizer", "adamw_8bit")]]
    # A base that is stored quantized stays as it is.
    if "nf4" in traits.quantization and plan.workload.quantization != "nf4" and not plan.workload.stored:
        return [[], [("model.quantization", "nf4")]]
    return [[]]


def _strategy_changes(plan: Plan) -> list[list[Change]]:
    """Return the strategies that shard more than the recipe's, with several processes."""
    if plan.workload.processes == 1:
        return [[]]
    order = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    position = order.index(plan.workload.strategy) if plan.workload.strategy in order else len(order)
    stronger: list[list[Change]] = [[("train.strategy", name)] for name in order[position + 1 :]]
    # Offloading alone is ZeRO's, and saves most with sharded weights.
    offloaded: list[list[Change]] = [[("train.strategy", "zero3"), ("train.offload", "cpu")]]
    return [[], *stronger, *(offloaded if plan.workload.offload == "none" else [])]


def _fewer_parallel_samples(plan: Plan) -> list[list[Change]]:
    """Return smaller generation batches: their KV cache takes half of the memory left by the weights."""
    generation = plan.workload.rollout
    # TRL's trainers have no generation batch: they sample the completions of a step at once.
    if generation is None or not plan.stage.BATCHES_GENERATION:
        return [[]]
    row_bytes = plan.estimate.kv_cache_bytes // generation.rows
    # The first phase is loading: what it leaves is free for caches.
    free_bytes = plan.available_bytes - plan.estimate.phases[0].total
    # Half, as logits and the copy that each appended token makes need memory too.
    rows = max(1, free_bytes // 2 // row_bytes)
    current_rows = generation.rows * plan.workload.processes
    # If not even the weights fit, other changes have to free the memory first.
    candidates = [rows, rows // 4] if free_bytes > 0 else [8]
    return [
        [],
        *(
            [("sampling.generation_batch_size", candidate * plan.workload.processes)]
            for candidate in candidates
            if 0 < candidate < current_rows
        ),
    ]


def _shorter_rows(plan: Plan) -> list[list[Change]]:
    """Return rows of a half or a quarter of the length (prompts and completions too), or smaller batches."""
    settings, stage = plan.recipe.settings, plan.stage
    changes: list[list[Change]] = [[]]
    if stage.GENERATES and not stage.BATCHES_GENERATION:
        # TRL samples the full batch at once, and a batch cannot be smaller than one group.
        batch_sizes = (settings.train.batch_size // divisor for divisor in (2, 4, 8, 16))
        return [
            [],
            *(
                [("train.batch_size", size)]
                for size in batch_sizes
                if size >= dict(settings)["sampling"].num_generations
            ),
        ]
    for divisor in (2, 4):
        seq_len = plan.workload.seq_len // divisor
        if stage.GENERATES:
            completion_tokens = int(dict(settings)["sampling"].max_new_tokens) // divisor
            if completion_tokens >= MIN_PROPOSED_LENGTH // divisor:
                prompt_tokens = max(2, plan.lengths.longest_prompt // divisor)
                changes.append(
                    [
                        ("data.max_prompt_length", prompt_tokens),
                        ("sampling.max_new_tokens", completion_tokens),
                    ]
                )
        elif plan.lengths.longest // divisor >= MIN_PROPOSED_LENGTH and seq_len:
            changes.append([("data.max_length", plan.lengths.longest // divisor)])
    return changes


def _seconds_per_token(plan: Plan) -> float:
    return plan.estimate.seconds_per_token(plan.device, plan.work)


def _format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
