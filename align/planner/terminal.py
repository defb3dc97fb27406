"""A plan on the console: whether it fits, memory by phase and category, steps, time, auto values."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from align.planner.alternatives import Alternative
from align.planner.plan import Plan
from finetune.distributed.hardware import FASTER_ALLOCATOR_GAIN, GIB, RESERVED_BYTES, faster_allocator
from finetune.planner.estimate import Phase, TotalWork

MIB = 2**20
MIB_THRESHOLD = 2 * GIB
"""Peaks below this are printed in MiB."""
TIGHT_FRACTION = 0.05
"""Fraction of the device: less free memory than this may be lost to allocator fragmentation."""
MAX_SHOWN = 8


def print_plan(plan: Plan, console: Console, *, command: str) -> None:
    """Print a plan; ``command`` is the command that runs the recipe."""
    _print_head(plan, console)
    console.print(_memory_table(plan))
    _print_line(console, "device", _device_text(plan))
    for label, text in summary_lines(plan):
        _print_line(console, label, text)
    for index, (key, (value, reason)) in enumerate(plan.auto.items()):
        _print_line(console, "auto" if not index else "", f"{key}={value}  ({reason})")
    for note in plan.recipe.notes:
        _print_line(console, "note", note)
    if plan.device.kind == "cpu" and (library := faster_allocator()):
        text = f"LD_PRELOAD={library} {command}  ({FASTER_ALLOCATOR_GAIN})"
        _print_line(console, "faster", text)
    if plan.fits:
        _print_line(console, "next", command)


def _print_head(plan: Plan, console: Console) -> None:
    workload, recipe = plan.workload, plan.recipe
    method = "full tuning" if workload.adapter.full_finetuning else workload.adapter.method
    quantization = "" if workload.quantization == "none" else f" on {workload.quantization}"
    device_count = f"{workload.processes} x " if workload.processes > 1 else ""
    strategy = f", {workload.strategy}" if workload.processes > 1 else ""
    offload = f", offload to {workload.offload}" if workload.offload != "none" else ""
    hardware = f"{device_count}{plan.device.name}{strategy}{offload}"
    summary = f"{recipe.settings.model.base}, {method}{quantization}, {workload.precision}, on {hardware}"
    console.print(
        f"[bold]{recipe.stage} {escape(recipe.name)}[/]  {escape(summary)}", highlight=False, soft_wrap=True
    )
    console.print(
        fit_verdict(plan), style="green" if plan.fits else "bold red", highlight=False, soft_wrap=True
    )
    console.print()


def fit_verdict(plan: Plan) -> str:
    """Return one sentence: does it fit, and by how much?"""
    peak, available = plan.peak, plan.available_bytes
    per_process = " per process" if plan.device.kind == "cpu" and plan.workload.processes > 1 else ""
    program = plan.device.program_bytes
    total = peak.total + program
    # What top shows for the process, and what it is compared with.
    parts = f" ({format_bytes(program)} of it Python and its libraries)" if program else ""
    measured = " now" if plan.device.free is not None else ""
    free_text = f"{plan.device.name} has {format_bytes(available + program)} free{per_process}{measured}"
    usage = f"peak {format_bytes(total)}{parts} in '{peak.name}'; {free_text}"
    if not plan.fits:
        return f"Does not fit: {usage}, {format_bytes(peak.total - available)} too little."
    free = available - peak.total
    warning = " Tight: allocator fragmentation may use it up." if free < TIGHT_FRACTION * available else ""
    return f"Fits: {usage}, {format_bytes(free)} to spare.{warning}"


def _memory_table(plan: Plan) -> Table:
    """Return a table of phases by categories, the peak in bold."""
    peak, unit = plan.peak, _unit(plan.peak.total)
    name = "GiB" if unit == GIB else "MiB"
    scope = "per process" if plan.workload.processes > 1 else "of the run"
    table = Table(title=f"memory {scope}, {name}", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    phases, merge = plan.estimate.phases, plan.estimate.merge
    for phase in phases:
        # In parentheses: a merge is a separate command and does not count for the verdict.
        title = f"({phase.name})" if phase is merge else phase.name
        table.add_column(title, justify="right", style="bold" if phase is peak else "", max_width=12)
    for category in peak.categories:
        sizes = [phase.categories[category] for phase in phases]
        if any(sizes):
            table.add_row(category, *(_format_cell(nbytes, unit) for nbytes in sizes))
    totals = [_format_total(phase, unit, peak=phase is peak) for phase in phases]
    table.add_row("total", *totals, style="bold", end_section=True)
    if any(phase.host for phase in phases):
        table.add_row("host memory", *(_format_cell(phase.host, unit) for phase in phases), style="dim")
    return table


def _format_total(phase: Phase, unit: int, *, peak: bool) -> str:
    text = _format_cell(phase.total, unit)
    return f"[reverse]{text}[/]" if peak else text


def _format_cell(nbytes: int, unit: int) -> str:
    if not nbytes:
        return "-"
    return f"{nbytes / unit:,.2f}" if unit == GIB else f"{nbytes / unit:,.0f}"


def _unit(peak: int) -> int:
    return GIB if peak >= MIB_THRESHOLD else MIB


def _device_text(plan: Plan) -> str:
    device = plan.device
    if device.kind == "cpu":
        free = "" if device.free is None else f", {format_bytes(device.free)} free now"
        return f"{device.name}: {format_bytes(device.memory)} of memory{free}"
    reserved_bytes = format_bytes(RESERVED_BYTES[device.kind])
    return f"{device.name}: {format_bytes(device.memory)}, minus {reserved_bytes} for the CUDA context"


def summary_lines(plan: Plan) -> Iterable[tuple[str, str]]:
    """Yield labels and lines about the full run."""
    trainable, total, merge = plan.estimate.trainable, plan.estimate.total, plan.estimate.merge
    yield "trained", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"
    yield "rows", plan.lengths.basis
    yield from _work_lines(plan)
    yield "disk", _disk_text(plan)
    if merge is not None and merge.total > plan.available_bytes and plan.device.kind == "cuda":
        needed = format_bytes(merge.total)
        yield "merge", f"`llm-align merge` needs {needed}: set CUDA_VISIBLE_DEVICES= to run it on the CPU"


def _work_lines(plan: Plan) -> Iterable[tuple[str, str]]:
    settings, work = plan.recipe.settings, plan.work
    if work is None:
        yield "steps", f"unknown: epochs={settings.train.epochs:g} over an unknown number of rows"
        yield "", "pass local data with --data FILE, or set train.max_steps=N"
        return
    yield "tokens", f"{_tokens_text(plan, work)}{_forward_text(plan)}"
    workload = plan.workload
    plural = "es" if workload.accumulation_steps > 1 else ""
    micro_batches = f"{workload.accumulation_steps} micro-batch{plural} of {plan.micro_batch_size}"
    per_process = " per process" if workload.processes > 1 else ""
    yield "steps", f"{work.steps:,} of {settings.train.batch_size} rows: {micro_batches}{per_process}"
    if plan.time is None:
        yield "time", f"unknown: no throughput data for {plan.device.name}; name a GPU (--gpu rtx4090)"
    else:
        yield (
            "time",
            f"{format_seconds(plan.time.lower)} to {format_seconds(plan.time.upper)}  ({plan.time.basis})",
        )


def _tokens_text(plan: Plan, work: TotalWork) -> str:
    """Return the tokens of a run, with the words and the numbers of ``llm-align data``."""
    trained_share = plan.stage.trained_share(plan.lengths)
    if trained_share is None:  # sampled completions: their lengths are limits
        return f"at most {format_tokens(work.trained_tokens)} of prompts and completions trained on"
    trained = trained_share * work.trained_tokens
    trained_text = format_tokens(trained).removesuffix(" tokens")
    if plan.lengths.is_exact:
        return f"{work.trained_tokens:,.0f} tokens, {trained:,.0f} of them trained"
    at_most = "at most " if plan.lengths.is_upper_bound else "about "
    return f"{at_most}{format_tokens(work.trained_tokens)}, {trained_text} of them trained"


def _forward_text(plan: Plan) -> str:
    work = plan.work
    assert work is not None
    text = (
        f", {format_tokens(work.forward_tokens)} scored by reference, value or reward models"
        if work.forward_tokens
        else ""
    )
    return text + (f", {work.completions:,} completions sampled" if work.completions else "")


def _disk_text(plan: Plan) -> str:
    # Optional files have a comma in their name ("merged model, if ...").
    written = {name: nbytes for name, nbytes in plan.disk.items() if "," not in name}
    optional = [f"{name}: {format_bytes(nbytes)}" for name, nbytes in plan.disk.items() if "," in name]
    breakdown = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in written.items())
    return "; ".join([f"{format_bytes(sum(written.values()))} ({breakdown})", *optional])


def print_alternatives(
    alternatives: Sequence[Alternative], plan: Plan, console: Console, *, command: str
) -> None:
    """Print alternatives, the cheapest that fits first, and the command to run."""
    console.print()
    fitting = [alternative for alternative in alternatives if alternative.plan.fits]
    table = Table(
        title="alternatives; time relative to the unchanged recipe",
        title_justify="left",
        title_style="bold",
        box=None,
    )
    for name, justify in (("fits", "left"), ("peak", "right"), ("micro-batch", "right"), ("time", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("append to the command", overflow="fold")
    table.add_row(
        _yes_or_no(plan.fits),
        format_bytes(plan.peak.total),
        str(plan.micro_batch_size),
        "1.00",
        "(unchanged)",
    )
    for alternative in select_alternatives(alternatives):
        overrides = escape(alternative.overrides)
        text = (
            f"[bold]{overrides}[/]" if fitting and alternative is fitting[0] and not plan.fits else overrides
        )
        cells = (
            _yes_or_no(alternative.plan.fits),
            format_bytes(alternative.plan.peak.total),
            str(alternative.plan.micro_batch_size),
            f"{alternative.relative_time:.2f}",
        )
        table.add_row(*cells, text)
    console.print(table)
    console.print()
    _print_line(console, "next", _advice(plan, fitting, command))


def select_alternatives(alternatives: Sequence[Alternative]) -> list[Alternative]:
    """Return the alternatives to print: the cheapest that fit, and single changes, without duplicates."""
    # Of alternatives with equal results the first wins, reversed since later keys overwrite earlier ones.
    by_result = {
        (
            alternative.plan.peak.total,
            alternative.plan.micro_batch_size,
            round(alternative.relative_time, 2),
        ): alternative
        for alternative in reversed(alternatives)
    }
    distinct = sorted(by_result.values(), key=alternatives.index)
    best = [alternative for alternative in distinct if alternative.plan.fits][:MAX_SHOWN]
    single = [
        alternative for alternative in distinct if len(alternative.changes) == 1 and alternative not in best
    ]
    return [*best, *single[:MAX_SHOWN]]


def _advice(plan: Plan, fitting: Sequence[Alternative], command: str) -> str:
    if plan.fits:
        return f"no change needed: {command}"
    if fitting:
        return f"{command} {fitting[0].overrides}"
    return "no alternative fits: use a smaller base, a larger GPU (--gpu) or more GPUs (--gpus)"


def _yes_or_no(fits: bool) -> str:
    return "[green]yes[/]" if fits else "[red]no[/]"


def _print_line(console: Console, label: str, text: str) -> None:
    # Values may contain brackets, which rich reads as markup; soft_wrap leaves commands in one line to copy.
    console.print(f"[bold]{label:<9}[/]{escape(text)}", highlight=False, soft_wrap=True)


def format_bytes(nbytes: int) -> str:
    """Format bytes in GiB or MiB."""
    return f"{nbytes / GIB:.1f} GiB" if abs(nbytes) >= GIB else f"{nbytes / MIB:.0f} MiB"


def format_tokens(tokens: float) -> str:
    """Format a number of tokens."""
    for name, unit in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if tokens >= unit:
            return f"{tokens / unit:.3g} {name} tokens"
    return f"{tokens:.0f} tokens"


def format_seconds(seconds: float) -> str:
    """Format a duration."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"
