"""A plan on the console: whether it fits, memory by phase and category, steps, time, auto values."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from align.planning.fit import Alternative
from align.planning.plan import MERGE, Plan
from finetune.planning.devices import GIB, TAKEN
from finetune.planning.memory import PARTS, Phase

MIB = 2**20
SMALL = 2 * GIB
"""Peaks below are printed in MiB."""
TIGHT = 0.05
"""Share of the device below which free memory may be lost to allocator fragmentation."""
SHOWN = 8


def print_plan(plan: Plan, console: Console, *, command: str) -> None:
    """Print a plan; ``command`` is the command that runs the recipe."""
    _head(plan, console)
    console.print(_memory(plan))
    _line(console, "device", _device(plan))
    for label, text in facts(plan):
        _line(console, label, text)
    for number, (key, (value, why)) in enumerate(plan.chosen.items()):
        _line(console, "auto" if not number else "", f"{key}={value}  ({why})")
    for note in plan.recipe.notes:
        _line(console, "note", note)
    if plan.fits:
        _line(console, "next", command)


def _head(plan: Plan, console: Console) -> None:
    step, recipe = plan.step, plan.recipe
    how = "full tuning" if step.adapter.whole_model else step.adapter.method
    stored = "" if step.quantization == "none" else f" on {step.quantization}"
    many = f"{step.processes} x " if step.processes > 1 else ""
    shared = f", {step.strategy}" if step.processes > 1 else ""
    offload = f", offload to {step.offload}" if step.offload != "none" else ""
    where = f"{many}{plan.device.name}{shared}{offload}"
    what = f"{recipe.settings.model.base}, {how}{stored}, {step.precision}, on {where}"
    console.print(f"[bold]{recipe.stage} {recipe.name}[/]  {escape(what)}", highlight=False, soft_wrap=True)
    console.print(verdict(plan), style="green" if plan.fits else "bold red", highlight=False, soft_wrap=True)
    console.print()


def verdict(plan: Plan) -> str:
    """Return one sentence: does it fit, and by how much?"""
    top, room = plan.peak, plan.room
    each = " per process" if plan.device.kind == "cpu" and plan.step.processes > 1 else ""
    here = f"peak {size(top.total)} in '{top.name}'; {plan.device.name} has {size(room)} free{each}"
    if not plan.fits:
        return f"Does not fit: {here}, {size(top.total - room)} too little."
    left = room - top.total
    tight = " Tight: allocator fragmentation may use it up." if left < TIGHT * room else ""
    return f"Fits: {here}, {size(left)} to spare.{tight}"


def _memory(plan: Plan) -> Table:
    """Return a table of phases by categories, the peak in bold."""
    top, unit = plan.peak, _unit(plan.peak.total)
    name = "GiB" if unit == GIB else "MiB"
    whose = "per process" if plan.step.processes > 1 else "of the run"
    table = Table(title=f"memory {whose}, {name}", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    for phase in plan.phases:
        # In parentheses: a merge is a separate command and does not count for the verdict.
        title = f"({phase.name})" if phase.name == MERGE else phase.name
        table.add_column(title, justify="right", style="bold" if phase is top else "", max_width=12)
    for part in PARTS:
        numbers = [phase.parts[part] for phase in plan.phases]
        if any(numbers):
            table.add_row(part, *(_cell(number, unit) for number in numbers))
    totals = [_total(phase, unit, peak=phase is top) for phase in plan.phases]
    table.add_row("total", *totals, style="bold", end_section=True)
    if any(phase.host for phase in plan.phases):
        table.add_row("host memory", *(_cell(phase.host, unit) for phase in plan.phases), style="dim")
    return table


def _total(phase: Phase, unit: int, *, peak: bool) -> str:
    text = _cell(phase.total, unit)
    return f"[reverse]{text}[/]" if peak else text


def _cell(number: int, unit: int) -> str:
    if not number:
        return "-"
    return f"{number / unit:,.2f}" if unit == GIB else f"{number / unit:,.0f}"


def _unit(most: int) -> int:
    return GIB if most >= SMALL else MIB


def _device(plan: Plan) -> str:
    device = plan.device
    taken = "the CUDA context" if device.kind == "cuda" else "the Python process"
    return f"{device.name}: {size(device.memory)}, minus {size(TAKEN[device.kind])} for {taken}"


def facts(plan: Plan) -> Iterable[tuple[str, str]]:
    """Yield labels and lines about the full run."""
    yield "trained", f"{plan.trained:,} of {plan.total:,} parameters ({plan.trained / plan.total:.2%})"
    yield "rows", plan.lengths.how
    yield from _amount(plan)
    yield "disk", _disk(plan)
    merge = next((phase for phase in plan.phases if phase.name == MERGE), None)
    if merge is not None and merge.total > plan.room and plan.device.kind == "cuda":
        yield (
            "merge",
            f"`llm-align merge` needs {size(merge.total)}: set CUDA_VISIBLE_DEVICES= to run it on the CPU",
        )


def _amount(plan: Plan) -> Iterable[tuple[str, str]]:
    settings, done = plan.recipe.settings, plan.work
    if done is None:
        yield "steps", f"unknown: epochs={settings.train.epochs:g} over an unknown number of rows"
        yield "", "pass local data with --data FILE, or set train.max_steps=N"
        return
    at_most = "at most " if plan.lengths.bound else "about "
    yield "tokens", f"{at_most}{amount(done.learnt)} trained on{_read(plan)}"
    step = plan.step
    passes = f"{step.accumulated} micro-batch{'es' if step.accumulated > 1 else ''} of {plan.rows}"
    each = " per process" if step.processes > 1 else ""
    yield "steps", f"{done.steps:,} of {settings.train.batch_size} rows: {passes}{each}"
    if plan.seconds is None:
        yield "time", f"unknown: no throughput data for {plan.device.name}; name a GPU (--gpu rtx4090)"
    else:
        yield "time", f"{span(plan.seconds.least)} to {span(plan.seconds.most)}  ({plan.seconds.how})"


def _read(plan: Plan) -> str:
    done = plan.work
    assert done is not None
    read = f", {amount(done.read)} scored by reference, value or reward models" if done.read else ""
    return read + (f", {done.replies:,} completions sampled" if done.replies else "")


def _disk(plan: Plan) -> str:
    # Optional files have a comma in their name ("merged model, if ...").
    kept = {name: number for name, number in plan.disk.items() if "," not in name}
    asked = [f"{name}: {size(number)}" for name, number in plan.disk.items() if "," in name]
    parts = ", ".join(f"{name} {size(number)}" for name, number in kept.items())
    return "; ".join([f"{size(sum(kept.values()))} ({parts})", *asked])


def print_alternatives(found: Sequence[Alternative], plan: Plan, console: Console, *, command: str) -> None:
    """Print alternatives, the cheapest that fits first, and the command to run."""
    console.print()
    fitting = [one for one in found if one.plan.fits]
    table = Table(
        title="alternatives; time relative to the unchanged recipe",
        title_justify="left",
        title_style="bold",
        box=None,
    )
    for name, side in (("fits", "left"), ("peak", "right"), ("micro-batch", "right"), ("time", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    table.add_column("append to the command", overflow="fold")
    table.add_row(_yes(plan.fits), size(plan.peak.total), str(plan.rows), "1.00", "(unchanged)")
    for one in shown(found):
        words = escape(one.words)
        text = f"[bold]{words}[/]" if fitting and one is fitting[0] and not plan.fits else words
        cells = (_yes(one.plan.fits), size(one.plan.peak.total), str(one.plan.rows), f"{one.time:.2f}")
        table.add_row(*cells, text)
    console.print(table)
    console.print()
    _line(console, "next", _advice(plan, fitting, command))


def shown(found: Sequence[Alternative]) -> list[Alternative]:
    """Return the alternatives to print: the cheapest that fit, and single changes, without duplicates."""
    # Of alternatives with equal results the first wins, reversed since later keys overwrite earlier ones.
    alike = {(one.plan.peak.total, one.plan.rows, round(one.time, 2)): one for one in reversed(found)}
    others = sorted(alike.values(), key=found.index)
    best = [one for one in others if one.plan.fits][:SHOWN]
    single = [one for one in others if len(one.changes) == 1 and one not in best]
    return [*best, *single[:SHOWN]]


def _advice(plan: Plan, fitting: Sequence[Alternative], command: str) -> str:
    if plan.fits:
        return f"no change needed: {command}"
    if fitting:
        return f"{command} {fitting[0].words}"
    return "no alternative fits: use a smaller base, a larger GPU (--gpu) or more GPUs (--gpus)"


def _yes(fits: bool) -> str:
    return "[green]yes[/]" if fits else "[red]no[/]"


def _line(console: Console, label: str, text: str) -> None:
    console.print(f"[bold]{label:<9}[/]{escape(text)}", highlight=False, soft_wrap=True)


def size(number: int) -> str:
    """Format bytes in GiB or MiB."""
    return f"{number / GIB:.1f} GiB" if abs(number) >= GIB else f"{number / MIB:.0f} MiB"


def amount(tokens: float) -> str:
    """Format a number of tokens."""
    for name, unit in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if tokens >= unit:
            return f"{tokens / unit:.3g} {name} tokens"
    return f"{tokens:.0f} tokens"


def span(seconds: float) -> str:
    """Format a duration."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"
