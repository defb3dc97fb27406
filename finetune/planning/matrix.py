"""COMPATIBILITY.md: every cell of the compatibility matrix checked, rows with equal verdicts merged.

``python -m finetune.planning.compatibility_page`` prints it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from finetune.planning.compatibility import RULES, Rule
from finetune.planning.solver import (
    OFFLOADS,
    OPTIMIZERS,
    STRATEGIES,
    Combination,
    Verdict,
    judge,
    settings_text,
    wants_two_passes,
)
from finetune.recipe.checks import adapter_traits
from finetune.recipe.discovery import ADAPTERS, plugin_names, stage_names
from finetune.recipe.recipe import adapter_settings, stage_settings

DEVICES = ("cpu", "cuda")
YES, NO = "yes", "no"
HEAD = """\
# Compatibility of adapters, quantization, strategies and engines

Generated from `finetune/planning/compatibility.py` by `python -m finetune.planning.compatibility_page`. For
one stage: `llm-align plan --compatibility`. Every run is checked before anything is loaded: values that
nobody set are changed where that helps, with a note; other incompatible settings end with exit status 2 and
a repair.

`yes`: works. `zero3 [fsdp2-quantized]`: works with this value instead, because of the rule of that name
below. `no [...]`: incompatible. All columns but `single` are for several processes.
"""
EVIDENCE = {
    "run": "tested here",
    "source": "read in the library's source",
    "thread": "reported by users",
    "ours": "by design",
}


@dataclass(frozen=True, slots=True)
class Row:
    """Cells of one table row and their common label: (adapter, quantization) pairs, or one value."""

    names: tuple[str, ...]
    cells: tuple[Combination, ...]
    verdicts: tuple[Verdict, ...]


def engine_of(stage: str) -> str:
    """Return a stage's default engine."""
    return stage_settings(stage)().train.engine


def cells(stage: str, device: str) -> Iterator[Combination]:
    """Yield every adapter x supported quantization x strategy, on two processes or more."""
    start = Combination(stage=stage, device=device, engine=engine_of(stage))
    for method in plugin_names(ADAPTERS):
        twice = wants_two_passes(adapter_settings(method)())
        for stored in adapter_traits(method).quantization:
            base = replace(start, adapter=method, quantization=stored, two_passes=twice)
            yield from across(base)


def across(base: Combination) -> tuple[Combination, ...]:
    """Return a combination under each strategy, with as many processes as that needs."""
    return tuple(replace(base, strategy=name, processes=1 if name == "single" else 2) for name in STRATEGIES)


def adapter_rows(stage: str, device: str) -> list[Row]:
    """Return a stage's table: adapters and quantizations with equal verdicts share a row."""
    found = list(cells(stage, device))
    lines = [found[start : start + len(STRATEGIES)] for start in range(0, len(found), len(STRATEGIES))]
    return _merged((f"{line[0].adapter} {line[0].quantization}", tuple(line)) for line in lines)


def optimizer_rows(device: str) -> list[Row]:
    """Return the table of optimizers."""
    start = Combination(device=device)
    return _merged((name, across(replace(start, optimizer=name))) for name in OPTIMIZERS)


def offload_rows(device: str) -> list[Row]:
    """Return the table of offload targets."""
    start = Combination(device=device)
    return _merged((name, across(replace(start, offload=name))) for name in OFFLOADS)


def engine_rows(device: str) -> list[Row]:
    """Return the table of stages on TRL's trainers."""
    start = Combination(device=device, engine="trl")
    return _merged((name, across(replace(start, stage=name))) for name in stage_names())


def cell_text(verdict: Verdict) -> str:
    """Return a verdict as a table cell: yes, the values that make it work, or no."""
    if verdict.kind == "works":
        return YES
    names = ", ".join(dict.fromkeys(rule.name for rule in verdict.rules))
    if verdict.kind == "cannot":
        return f"{NO} [{names}]"
    only = list(verdict.changes) == ["train.strategy"]
    text = str(verdict.changes["train.strategy"]) if only else settings_text(verdict.changes)
    return f"{text} [{names}]"


def rules_in(rows: Iterable[Row]) -> list[Rule]:
    """Return the rules that a table's cells name, in order."""
    hit = {rule.name for row in rows for verdict in row.verdicts for rule in verdict.rules}
    return [rule for rule in RULES if rule.name in hit]


def page() -> str:
    """Return COMPATIBILITY.md."""
    parts = [HEAD]
    for device in DEVICES:
        parts.append(f"## On {'CPUs' if device == 'cpu' else 'GPUs'}\n")
        for stages, rows in _by_table(device):
            parts.append(f"### {', '.join(stages)}\n\n{_table('quantization: adapters', rows)}")
        for title, rows in (
            ("optimizer", optimizer_rows(device)),
            ("train.offload", offload_rows(device)),
            ("train.engine=trl", engine_rows(device)),
        ):
            parts.append(f"### {title}\n\n{_table(title, rows)}")
    parts.append("## Rules\n\n" + "\n".join(rule_line(rule) for rule in RULES))
    return "\n".join(parts) + "\n"


def _by_table(device: str) -> Iterator[tuple[list[str], list[Row]]]:
    """Yield tables with all stages that have the same one."""
    tables: dict[str, tuple[list[str], list[Row]]] = {}
    for stage in stage_names():
        rows = adapter_rows(stage, device)
        # Stages share a table if it renders to the same text.
        tables.setdefault(_table("", rows), ([], rows))[0].append(stage)
    yield from tables.values()


def _merged(lines: Iterable[tuple[str, tuple[Combination, ...]]]) -> list[Row]:
    """Return rows, merging those with equal verdicts."""
    rows: dict[tuple[str, ...], list[tuple[str, tuple[Combination, ...], tuple[Verdict, ...]]]] = {}
    for name, line in lines:
        verdicts = tuple(judge(cell) for cell in line)
        # Verdicts with the same text are equal for a reader, so their rows are merged.
        rows.setdefault(tuple(map(cell_text, verdicts)), []).append((name, line, verdicts))
    return [
        Row(
            tuple(name for name, _, _ in same),
            tuple(cell for _, line, _ in same for cell in line),
            same[0][2],
        )
        for same in rows.values()
    ]


def row_name(names: tuple[str, ...]) -> str:
    """Return a row's label.

    >>> row_name(("dora none", "dora nf4", "lora none", "lora nf4", "full none"))
    'none/nf4: dora, lora; none: full'
    """
    by_adapter: dict[str, list[str]] = {}
    for name in names:
        adapter, _, stored = name.partition(" ")
        by_adapter.setdefault(adapter, []).append(stored)
    by_base: dict[str, list[str]] = {}
    for adapter, bases in by_adapter.items():
        by_base.setdefault("/".join(filter(None, bases)), []).append(adapter)
    return "; ".join(f"{base}: {', '.join(one)}" if base else ", ".join(one) for base, one in by_base.items())


def _table(title: str, rows: list[Row]) -> str:
    head = f"| {title} | {' | '.join(STRATEGIES)} |\n|{' --- |' * (len(STRATEGIES) + 1)}\n"
    lines = (
        f"| {row_name(row.names)} | {' | '.join(cell_text(verdict) for verdict in row.verdicts)} |"
        for row in rows
    )
    return head + "\n".join(lines) + "\n"


def rule_line(rule: Rule) -> str:
    """Return a rule as a Markdown list item: reason, evidence, source."""
    return f"* **{rule.name}**: {rule.reason}. ({EVIDENCE[rule.evidence]}: {rule.source})"


if __name__ == "__main__":
    print(page(), end="")
