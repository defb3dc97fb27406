"""The plan of a recipe: its memory by phase, work, time and disk, computed without loading anything."""

from dataclasses import dataclass, field, replace
from math import ceil

from align.planning.forward import At, forward_pass
from align.planning.lengths import Lengths, lengths
from align.planning.timing import seconds
from align.planning.work import Work, work
from align.rl.settings import PromptSettings
from align.stages.kto import Settings as KtoSettings
from finetune.adapters import llama_adapter
from finetune.planning import choices
from finetune.planning.devices import SURE, Device
from finetune.planning.disk import disk_bytes
from finetune.planning.from_recipe import architecture_of, model_choices, step_of
from finetune.planning.hardware import Hardware
from finetune.planning.memory import Phase, peak, plan_memory
from finetune.planning.speed import Seconds
from finetune.planning.trained import trained_parameters
from finetune.planning.workload import Workload
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.settings import StageSettings

MERGE = "merge"
WITHOUT_ROWS = (MERGE, "rollout")
"""Phases whose memory does not depend on the micro-batch size."""
BLOCKS = "pretrain"
"""The stage whose documents are concatenated and split into blocks of data.max_length."""


@dataclass(frozen=True)
class Plan:
    """The resources that a run of a recipe needs.

    Attributes:
        recipe: the planned recipe.
        device: one of those that it runs on.
        workload: one optimizer step of one process.
        phases: the memory of a process, phase by phase.
        trainable: number of trainable parameters.
        lengths: of the rows.
        work: of the full run; None where the number of rows is unknown.
        time: of the full run; None where speed or rows are unknown.
        disk: bytes written, by kind.
        auto: values of settings that were ``auto``, with the reason for each.
        micro_batch_size: rows per micro-batch.
        workload_of_rows: number of rows -> the workload of that micro-batch.
    """

    recipe: Recipe
    device: Device
    step: Workload
    phases: tuple[Phase, ...]
    trained: int
    lengths: Lengths
    work: Work | None
    seconds: Seconds | None
    disk: dict[str, int]
    chosen: dict[str, tuple[str, str]]
    rows: int
    at: At = field(repr=False)

    @property
    def peak(self) -> Phase:
        """Return the run's phase with the highest peak; a merge is a separate command."""
        return peak(self.running)

    @property
    def running(self) -> list[Phase]:
        """Return the phases of the run itself, without the merge."""
        return [phase for phase in self.phases if phase.name != MERGE]

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.room

    @property
    def room(self) -> int:
        """Return the device bytes available to a process."""
        return self.device.share(self.step.processes)

    @property
    def total(self) -> int:
        """Return the number of parameters of base and adapter."""
        own = self.step.architecture.parameters
        return own if self.step.adapter.whole_model else own + self.trained


def plan_of(recipe: Recipe, device: Device, count: int, *, known: Plan | None = None) -> Plan:
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
    hardware = Hardware(device.kind, device.name, device.bfloat16, count)
    architecture = architecture_of(settings.model) if known is None else known.step.architecture
    made = model_choices(settings, hardware)
    processes = choices.processes(settings.train.processes, hardware)
    strategy = choices.strategy(settings.train.strategy, processes[0])
    context = architecture.context
    length = _longest(settings, context)
    found = _lengths(recipe, length[0]) if known is None else cut(known.lengths, length[0])
    step = replace(
        step_of(
            settings,
            architecture,
            precision=made["model.precision"][0],
            quantization=made["model.quantization"][0],
            device=device.kind,
        ),
        processes=processes[0],
        strategy=strategy[0],  # type: ignore[arg-type]  # the settings have the same Literal values
        offload=settings.train.offload,
    )
    at = _accumulating(settings, forward_pass(settings, step, found), processes[0])
    rows = _rows(settings, at, device, processes[0])
    chosen = {
        **made,
        "train.processes": (str(processes[0]), processes[1]),
        "train.strategy": strategy,
        _length_key(settings): (str(length[0]), length[1]),
        "train.micro_batch_size": (str(rows[0]), rows[1]),
        **_side_by_side(settings, at(1)),
    }
    return finished(recipe, device, at, rows[0], found, chosen)


def _side_by_side(settings: StageSettings, step: Workload) -> dict[str, tuple[str, str]]:
    """Return the generation batch size over all processes, for stages that generate."""
    if step.rollout is None:
        return {}
    asked, drawn = dict(settings)["sampling"].at_once, step.rollout
    width = drawn.prompt + drawn.completion
    why = "as requested" if asked != "auto" else f"prompt and completion have up to {width} tokens"
    return {"sampling.at_once": (str(drawn.lines * step.processes), why)}


def finished(
    recipe: Recipe,
    device: Device,
    at: At,
    rows: int,
    found: Lengths,
    chosen: dict[str, tuple[str, str]],
) -> Plan:
    """Return the plan for a micro-batch size."""
    settings, step = recipe.settings, at(rows)
    phases = plan_memory(step)
    trained = _trained(recipe, step)
    # PPO trains an adapter for the policy and one for the value model.
    trained *= 2 if step.objective == "ppo" else 1
    done = work(settings, found)
    return Plan(
        recipe=recipe,
        device=device,
        step=step,
        phases=phases,
        trained=trained,
        lengths=found,
        work=done,
        seconds=seconds(recipe, step, device, done=done, trained=trained, base=phases[0].parts["base"]),
        disk=disk_bytes(step, trained=trained, kept=settings.train.keep_checkpoints),
        chosen=chosen,
        rows=rows,
        at=at,
    )


def _trained(recipe: Recipe, step: Workload) -> int:
    """Return the number of trainable parameters of one role.

    Raises:
        UserError: the adapter does not support this base, with the message of a run.
    """
    method, family = step.adapter.method, step.architecture.family
    trained = trained_parameters(step.architecture, step.adapter, heads=step.heads)
    found = f"'{method}' on '{recipe.settings.model.base}', a model of type '{family}'"
    if method == "llama_adapter" and family not in llama_adapter.FAMILIES:
        expected = f"a model of type {', '.join(llama_adapter.FAMILIES)}"
        raise UserError(
            Problem("adapter.method", found, expected, "adapter.method=prefix works on any of them")
        )
    if not trained:
        repair = "adapter.method=ia3 or layernorm trains as few parameters and works on it"
        raise UserError(
            Problem("adapter.method", f"{found}: nothing to train", "a base with bias terms", repair)
        )
    return trained


def _accumulating(settings: StageSettings, at: At, processes: int) -> At:
    """Return workloads with the number of micro-batches per optimizer step."""

    def with_number(rows: int) -> Workload:
        return replace(at(rows), accumulated=ceil(settings.train.batch_size / (rows * processes)))

    return with_number


def _longest(settings: StageSettings, context: int) -> tuple[int, str]:
    """Return the maximum tokens of a row (of a prompt, in stages that generate), and the reason."""
    data, taken = settings.data, settings.adapter.positions
    if not isinstance(data, PromptSettings):
        return choices.max_length(data.max_length, context=context, virtual_tokens=taken)
    reply = int(settings.model_dump()["sampling"]["max_new_tokens"])
    if data.max_prompt_length is not None:
        return data.max_prompt_length, "as requested"
    room = min(context - taken, choices.DEFAULT_MAX_LENGTH) - reply
    return max(1, room), f"maximum length minus a completion of {reply} tokens"


def _length_key(settings: StageSettings) -> str:
    return "data.max_prompt_length" if isinstance(settings.data, PromptSettings) else "data.max_length"


def _lengths(recipe: Recipe, most: int) -> Lengths:
    settings = recipe.settings
    drawn, labels = isinstance(settings.data, PromptSettings), isinstance(settings, KtoSettings)
    # Without reading the data: pairs have two completions per row, other rows have one.
    pairs = settings.TRL_CONFIG in ("DPOConfig", "RewardConfig")
    found = lengths(
        settings.data,
        settings.model,
        seed=settings.train.seed,
        most=most,
        replies=0 if drawn else 2 if pairs else 1,
        labels=labels,
    )
    return _in_blocks(found, most) if recipe.stage == BLOCKS else found


def cut(known: Lengths, most: int) -> Lengths:
    """Return the lengths of rows truncated to a maximum length."""
    kept = min(1.0, most / max(1.0, known.prompt + known.reply))
    return replace(
        known,
        prompt=known.prompt * kept,
        reply=known.reply * kept,
        longest=min(most, known.longest),
        longest_prompt=min(most, known.longest_prompt),
        longest_reply=min(most, known.longest_reply),
    )


def _in_blocks(found: Lengths, most: int) -> Lengths:
    """Return documents as the blocks they are split into."""
    # All tokens, concatenated and split: blocks are full rows without a prompt.
    rows = None if found.rows is None else max(1, ceil(found.rows * found.together / most))
    full = float(most)
    return replace(
        found, rows=rows, prompt=0.0, reply=full, replies=1.0, longest=most, longest_reply=most, bound=False
    )


def least_rows(settings: StageSettings) -> int:
    """Return the minimum micro-batch size: KTO compares a completion with the others of its micro-batch."""
    return 2 if isinstance(settings, KtoSettings) else 1


def phases_of_rows(step: Workload) -> list[Phase]:
    """Return the phases whose memory depends on the micro-batch size."""
    return [phase for phase in plan_memory(step) if phase.name not in WITHOUT_ROWS]


def _rows(settings: StageSettings, at: At, device: Device, processes: int) -> tuple[int, str]:
    """Return the micro-batch size and its reason."""
    train = settings.train

    def fits(rows: int) -> bool:
        # auto leaves a margin for the plan's error; a requested size is compared with the full memory.
        return peak(phases_of_rows(at(rows))).total <= SURE * device.room

    return choices.micro_batch_size(
        train.micro_batch_size,
        batch_size=ceil(train.batch_size / processes),
        longest=at(1).columns,
        hardware=Hardware(device.kind, device.name, device.bfloat16),
        whole=train.engine == "trl",
        least=least_rows(settings),
        fits=fits if device.kind == "cuda" else None,
    )
