"""The plan of a recipe: its memory by phase, work, time and disk, computed without loading anything."""

from dataclasses import dataclass, field, replace
from math import ceil

from align.planner.micro_batch import WorkloadOfRows, micro_batch_workload
from align.planner.row_lengths import RowLengths, measure_lengths
from align.planner.timing import estimate_time
from align.planner.work import TotalWork, total_work
from align.rl.settings import PromptSettings
from align.stages.kto import Settings as KtoSettings
from finetune.adapters import llama_adapter
from finetune.distributed.hardware import SAFE_FRACTION, Device
from finetune.planner.disk import disk_bytes
from finetune.planner.from_recipe import base_workload, load_architecture
from finetune.planner.memory import Phase, peak_phase, plan_memory
from finetune.planner.parameter_count import count_trainable_parameters
from finetune.planner.speed import TimeEstimate
from finetune.planner.workload import Workload
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings
from finetune.training import auto_values

MERGE_PHASE = "merge"
ROW_INDEPENDENT_PHASES = (MERGE_PHASE, "rollout")
"""Phases whose memory does not depend on the micro-batch size."""
BLOCK_STAGE = "pretrain"
"""The stage whose documents are concatenated and split into blocks of data.max_length."""


@dataclass(frozen=True)
class Plan:
    """The resources that a run of a recipe needs.

    Attributes:
        recipe: the planned recipe.
        device: the device of each process.
        workload: one optimizer step of one process.
        phases: the memory of a process, phase by phase.
        trainable: number of trainable parameters.
        lengths: token lengths of the rows.
        work: of the full run; None where the number of rows is unknown.
        time: of the full run; None where speed or rows are unknown.
        disk: bytes written, by kind.
        auto: values of settings that were ``auto``, with the reason for each.
        micro_batch_size: rows per micro-batch.
        workload_of_rows: number of rows -> the workload of that micro-batch.
    """

    recipe: Recipe
    device: Device
    workload: Workload
    phases: tuple[Phase, ...]
    trainable: int
    lengths: RowLengths
    work: TotalWork | None
    time: TimeEstimate | None
    disk: dict[str, int]
    auto: dict[str, tuple[str, str]]
    micro_batch_size: int
    workload_of_rows: WorkloadOfRows = field(repr=False)

    @property
    def peak(self) -> Phase:
        """Return the run's phase with the highest peak; a merge is a separate command."""
        return peak_phase(self.run_phases)

    @property
    def run_phases(self) -> list[Phase]:
        """Return the phases of the run itself, without the merge."""
        return [phase for phase in self.phases if phase.name != MERGE_PHASE]

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.available_bytes

    @property
    def available_bytes(self) -> int:
        """Return the device bytes available to a process."""
        return self.device.available_bytes_per_process(self.workload.processes)

    @property
    def total(self) -> int:
        """Return the number of parameters of base and adapter."""
        base_parameters = self.workload.architecture.parameters
        return base_parameters if self.workload.adapter.full_finetuning else base_parameters + self.trainable


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
    settings = recipe.settings
    hardware = device.hardware(count)
    architecture = load_architecture(settings.model) if reuse is None else reuse.workload.architecture
    model_choices = auto_values.precision_and_quantization(settings, hardware)
    processes = auto_values.num_processes(settings.train.num_processes, hardware)
    strategy = auto_values.strategy(settings.train.strategy, processes[0])
    max_positions = architecture.max_positions
    max_length = _max_length(settings, max_positions)
    lengths = (
        _recipe_lengths(recipe, max_length[0])
        if reuse is None
        else truncated_lengths(reuse.lengths, max_length[0])
    )
    workload = replace(
        base_workload(
            settings,
            architecture,
            precision=model_choices["model.precision"][0],
            quantization=model_choices["model.quantization"][0],
            device=device.kind,
        ),
        processes=processes[0],
        strategy=strategy[0],  # type: ignore[arg-type]  # the settings have the same Literal values
        offload=settings.train.offload,
    )
    workload_of_rows = _with_accumulation(
        settings, micro_batch_workload(settings, workload, lengths), processes[0]
    )
    micro_batch_size = _micro_batch_size(settings, workload_of_rows, device, processes[0])
    auto = {
        **model_choices,
        "train.num_processes": (str(processes[0]), processes[1]),
        "train.strategy": strategy,
        _length_key(settings): (str(max_length[0]), max_length[1]),
        "train.micro_batch_size": (str(micro_batch_size[0]), micro_batch_size[1]),
        **_generation_batch_size(settings, workload_of_rows(1)),
    }
    return plan_for_rows(recipe, device, workload_of_rows, micro_batch_size[0], lengths, auto)


def _generation_batch_size(settings: StageSettings, workload: Workload) -> dict[str, tuple[str, str]]:
    """Return the generation batch size over all processes, for stages that generate."""
    if workload.rollout is None:
        return {}
    requested, generation = dict(settings)["sampling"].generation_batch_size, workload.rollout
    positions = generation.prompt + generation.completion
    reason = "as requested" if requested != "auto" else f"prompt and completion have up to {positions} tokens"
    return {"sampling.generation_batch_size": (str(generation.rows * workload.processes), reason)}


def plan_for_rows(
    recipe: Recipe,
    device: Device,
    workload_of_rows: WorkloadOfRows,
    micro_batch_size: int,
    lengths: RowLengths,
    auto: dict[str, tuple[str, str]],
) -> Plan:
    """Return the plan for a micro-batch size."""
    settings, workload = recipe.settings, workload_of_rows(micro_batch_size)
    phases = plan_memory(workload)
    trainable = _count_trainable(recipe, workload)
    # PPO trains an adapter for the policy and one for the value model.
    trainable *= 2 if workload.objective == "ppo" else 1
    work = total_work(settings, lengths)
    return Plan(
        recipe=recipe,
        device=device,
        workload=workload,
        phases=phases,
        trainable=trainable,
        lengths=lengths,
        work=work,
        time=estimate_time(
            recipe, workload, device, work=work, trainable=trainable, base_bytes=phases[0].categories["base"]
        ),
        disk=disk_bytes(workload, trained_params=trainable, num_checkpoints=settings.train.keep_checkpoints),
        auto=auto,
        micro_batch_size=micro_batch_size,
        workload_of_rows=workload_of_rows,
    )


def _count_trainable(recipe: Recipe, workload: Workload) -> int:
    """Return the number of trainable parameters of one role.

    Raises:
        UserError: the adapter does not support this base, with the message of a run.
    """
    method, family = workload.adapter.method, workload.architecture.family
    trainable = count_trainable_parameters(workload.architecture, workload.adapter, heads=workload.heads)
    actual = f"'{method}' on '{recipe.settings.model.base}', a model of type '{family}'"
    if method == "llama_adapter" and family not in llama_adapter.SUPPORTED_MODEL_TYPES:
        expected = f"a model of type {', '.join(llama_adapter.SUPPORTED_MODEL_TYPES)}"
        raise UserError(
            Problem("adapter.method", actual, expected, "adapter.method=prefix works on any of them")
        )
    if not trainable:
        repair = "adapter.method=ia3 or layernorm trains as few parameters and works on it"
        raise UserError(
            Problem("adapter.method", f"{actual}: nothing to train", "a base with bias terms", repair)
        )
    return trainable


def _with_accumulation(
    settings: StageSettings, workload_of_rows: WorkloadOfRows, processes: int
) -> WorkloadOfRows:
    """Return workloads with the number of micro-batches per optimizer step."""

    def with_accumulation_steps(rows: int) -> Workload:
        return replace(
            workload_of_rows(rows), accumulation_steps=ceil(settings.train.batch_size / (rows * processes))
        )

    return with_accumulation_steps


def _max_length(settings: StageSettings, max_positions: int) -> tuple[int, str]:
    """Return the maximum tokens of a row (of a prompt, in stages that generate), and the reason."""
    data, virtual_positions = settings.data, settings.adapter.positions
    if not isinstance(data, PromptSettings):
        return auto_values.max_length(
            data.max_length, context=max_positions, virtual_tokens=virtual_positions
        )
    completion_tokens = int(settings.model_dump()["sampling"]["max_new_tokens"])
    if data.max_prompt_length is not None:
        return data.max_prompt_length, "as requested"
    available = min(max_positions - virtual_positions, auto_values.DEFAULT_MAX_LENGTH) - completion_tokens
    return max(1, available), f"maximum length minus a completion of {completion_tokens} tokens"


def _length_key(settings: StageSettings) -> str:
    return "data.max_prompt_length" if isinstance(settings.data, PromptSettings) else "data.max_length"


def _recipe_lengths(recipe: Recipe, max_length: int) -> RowLengths:
    settings = recipe.settings
    is_generated, is_labelled = isinstance(settings.data, PromptSettings), isinstance(settings, KtoSettings)
    # Without reading the data: pairs have two completions per row, other rows have one.
    is_paired = settings.TRL_CONFIG in ("DPOConfig", "RewardConfig")
    lengths = measure_lengths(
        settings.data,
        settings.model,
        seed=settings.train.seed,
        max_length=max_length,
        completions=0 if is_generated else 2 if is_paired else 1,
        labels=is_labelled,
    )
    return _block_lengths(lengths, max_length) if recipe.stage == BLOCK_STAGE else lengths


def truncated_lengths(lengths: RowLengths, max_length: int) -> RowLengths:
    """Return the lengths of rows truncated to a maximum length."""
    # One factor for both: only means are known, not how each row divides into prompt and completion.
    retained_fraction = min(1.0, max_length / max(1.0, lengths.prompt + lengths.completion))
    return replace(
        lengths,
        prompt=lengths.prompt * retained_fraction,
        completion=lengths.completion * retained_fraction,
        longest=min(max_length, lengths.longest),
        longest_prompt=min(max_length, lengths.longest_prompt),
        longest_completion=min(max_length, lengths.longest_completion),
    )


def _block_lengths(lengths: RowLengths, max_length: int) -> RowLengths:
    """Return documents as the blocks they are split into."""
    # All tokens, concatenated and split: blocks are full rows without a prompt.
    rows = None if lengths.rows is None else max(1, ceil(lengths.rows * lengths.row_tokens / max_length))
    full = float(max_length)
    return replace(
        lengths,
        rows=rows,
        prompt=0.0,
        completion=full,
        completions=1.0,
        longest=max_length,
        longest_completion=max_length,
        is_upper_bound=False,
    )


def min_rows(settings: StageSettings) -> int:
    """Return the minimum micro-batch size: KTO compares a completion with the others of its micro-batch."""
    return 2 if isinstance(settings, KtoSettings) else 1


def row_dependent_phases(workload: Workload) -> list[Phase]:
    """Return the phases whose memory depends on the micro-batch size."""
    return [phase for phase in plan_memory(workload) if phase.name not in ROW_INDEPENDENT_PHASES]


def _micro_batch_size(
    settings: StageSettings, workload_of_rows: WorkloadOfRows, device: Device, processes: int
) -> tuple[int, str]:
    """Return the micro-batch size and its reason."""
    train = settings.train

    def fits(rows: int) -> bool:
        # auto leaves a margin for the plan's error; a requested size is compared with the full memory.
        return (
            peak_phase(row_dependent_phases(workload_of_rows(rows))).total
            <= SAFE_FRACTION * device.available_bytes
        )

    return auto_values.micro_batch_size(
        train.micro_batch_size,
        batch_size=ceil(train.batch_size / processes),
        # As the stage lays rows out: a prompt with all its completions may be one row.
        longest=workload_of_rows(1).seq_len,
        hardware=device.hardware(),
        must_divide=train.engine == "trl",
        min_rows=min_rows(settings),
        fits=fits if device.kind == "cuda" else None,
    )
