"""A recipe's plan: what it holds, does and leaves, and how long that takes; nothing is loaded."""

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
"""Phases in which the rows of a forward pass change nothing."""
BLOCKS = "pretrain"
"""The stage whose rows are documents, laid end to end and cut into blocks of data.max_length."""


@dataclass(frozen=True)
class Plan:
    """What a run of a recipe needs.

    Attributes:
        recipe: what is planned.
        device: one of those that it runs on.
        step: one optimizer step of one process.
        phases: the memory of a process, phase by phase.
        trained: parameters that are trained.
        lengths: of the rows.
        work: of the whole run; None where the number of rows is not known.
        seconds: of the whole run; None where neither speed nor rows are known.
        disk: bytes of what it writes.
        chosen: what was ``auto``, with the reason for each.
        at: a forward pass of so many rows.
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
        """Return the fullest phase of the run; a merge is a command of its own, after it."""
        return peak(self.running)

    @property
    def running(self) -> list[Phase]:
        """Return the phases of the run itself."""
        return [phase for phase in self.phases if phase.name != MERGE]

    @property
    def fits(self) -> bool:
        """Tell whether it fits the device's memory."""
        return self.peak.total <= self.room

    @property
    def room(self) -> int:
        """Return the bytes that a process has."""
        return self.device.share(self.step.processes)

    @property
    def total(self) -> int:
        """Return the parameters of base and adapter together."""
        own = self.step.architecture.parameters
        return own if self.step.adapter.whole_model else own + self.trained


def plan_of(recipe: Recipe, device: Device, count: int, *, known: Plan | None = None) -> Plan:
    """Return the plan of a recipe.

    Args:
        recipe: what is planned.
        device: what each process computes with.
        count: how many of them the machine has.
        known: a plan of the same base and the same rows, of which nothing has to be read again.

    Raises:
        UserError: a base of unknown shape, a choice that this device does not allow, mistakes in local data.
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
        strategy=strategy[0],  # type: ignore[arg-type]  # the recipe's words are the planner's
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
    """Return how many replies are drawn at once, over all processes, where any are."""
    if step.rollout is None:
        return {}
    asked, drawn = dict(settings)["sampling"].at_once, step.rollout
    width = drawn.prompt + drawn.completion
    why = "as asked" if asked != "auto" else f"prompt and reply have up to {width} tokens"
    return {"sampling.at_once": (str(drawn.lines * step.processes), why)}


def finished(
    recipe: Recipe,
    device: Device,
    at: At,
    rows: int,
    found: Lengths,
    chosen: dict[str, tuple[str, str]],
) -> Plan:
    """Return the plan of forward passes of so many rows."""
    settings, step = recipe.settings, at(rows)
    phases = plan_memory(step)
    trained = _trained(recipe, step)
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
    """Return the trained parameters of one role.

    Raises:
        UserError: the adapter is not for this base, as it would say once the base is loaded.
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
    """Return forward passes that know how many of them make an optimizer step."""

    def with_number(rows: int) -> Workload:
        return replace(at(rows), accumulated=ceil(settings.train.batch_size / (rows * processes)))

    return with_number


def _longest(settings: StageSettings, context: int) -> tuple[int, str]:
    """Return the tokens of a row at most (of a prompt, where replies are drawn), and why."""
    data, taken = settings.data, settings.adapter.positions
    if not isinstance(data, PromptSettings):
        return choices.max_length(data.max_length, context=context, virtual_tokens=taken)
    reply = int(settings.model_dump()["sampling"]["max_new_tokens"])
    if data.max_prompt_length is not None:
        return data.max_prompt_length, "as asked"
    room = min(context - taken, choices.DEFAULT_MAX_LENGTH) - reply
    return max(1, room), f"beside a reply of {reply} tokens"


def _length_key(settings: StageSettings) -> str:
    return "data.max_prompt_length" if isinstance(settings.data, PromptSettings) else "data.max_length"


def _lengths(recipe: Recipe, most: int) -> Lengths:
    settings = recipe.settings
    drawn, labels = isinstance(settings.data, PromptSettings), isinstance(settings, KtoSettings)
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
    """Return lengths of rows that are cut at so many tokens."""
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
    """Return documents as the blocks that they are cut into."""
    rows = None if found.rows is None else max(1, ceil(found.rows * found.together / most))
    full = float(most)
    return replace(
        found, rows=rows, prompt=0.0, reply=full, replies=1.0, longest=most, longest_reply=most, bound=False
    )


def least_rows(settings: StageSettings) -> int:
    """Return the rows that a forward pass must have: KTO measures a reply against those beside it."""
    return 2 if isinstance(settings, KtoSettings) else 1


def phases_of_rows(step: Workload) -> list[Phase]:
    """Return the phases that hold the rows of a forward pass."""
    return [phase for phase in plan_memory(step) if phase.name not in WITHOUT_ROWS]


def _rows(settings: StageSettings, at: At, device: Device, processes: int) -> tuple[int, str]:
    """Return the rows of a forward pass, and why."""
    train = settings.train

    def fits(rows: int) -> bool:
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
