"""Compatibility tables: which adapters, quantizations and strategies work together, and why others do not.

``llm-align plan --compatibility`` prints those of a stage; docs/reference/compatibility.md has every cell of
every stage. Rows with equal verdicts are merged.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.distributed.hardware import detect_devices, device_by_name
from finetune.distributed.solver import (
    OFFLOADS,
    OPTIMIZER_NAMES,
    Combination,
    Verdict,
    check,
    format_overrides,
    needs_two_passes,
    solver_rules,
)
from finetune.distributed.strategies import STRATEGIES
from finetune.recipe.compatibility import Rule
from finetune.recipe.console import Terminal
from finetune.recipe.discovery import ADAPTERS, adapter_settings, adapter_traits, plugin_names, stage_names
from finetune.recipe.recipe import stage_settings
from finetune.recipe.terminal import echo_json

DEVICE_KINDS = ("cpu", "cuda")
YES, NO = "yes", "no"
EVIDENCE_TEXTS = {
    "run": "tested here",
    "source": "read in the library's source",
    "ours": "by design",
}
VERDICT_COLORS = {"works": "green", "changed": "yellow", "incompatible": "red"}


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """Cells of one table row and their common label: (adapter, quantization) pairs, or one value."""

    labels: tuple[str, ...]
    cells: tuple[Combination, ...]
    verdicts: tuple[Verdict, ...]


def default_engine(stage: str) -> str:
    """Return a stage's default engine."""
    return stage_settings(stage)().train.engine


def matrix_cells(stage: str, device: str) -> Iterator[Combination]:
    """Yield every adapter x supported quantization x strategy, on two processes or more."""
    stage_combination = Combination(stage=stage, device=device, engine=default_engine(stage))
    for method in plugin_names(ADAPTERS):
        two_passes = needs_two_passes(adapter_settings(method)())
        for quantization in adapter_traits(method).quantization:
            base = replace(
                stage_combination, adapter=method, quantization=quantization, two_passes=two_passes
            )
            yield from across_strategies(base)


def across_strategies(base: Combination) -> tuple[Combination, ...]:
    """Return a combination under each strategy, with as many processes as that needs."""
    return tuple(replace(base, strategy=name, processes=1 if name == "single" else 2) for name in STRATEGIES)


def adapter_rows(stage: str, device: str) -> list[VerdictRow]:
    """Return a stage's table: adapters and quantizations with equal verdicts share a row."""
    combinations = list(matrix_cells(stage, device))
    rows = [
        combinations[offset : offset + len(STRATEGIES)]
        for offset in range(0, len(combinations), len(STRATEGIES))
    ]
    return _merge_equal_rows((f"{row[0].adapter} {row[0].quantization}", tuple(row)) for row in rows)


def optimizer_rows(device: str) -> list[VerdictRow]:
    """Return the table of optimizers."""
    combination = Combination(device=device)
    return _merge_equal_rows(
        (name, across_strategies(replace(combination, optimizer=name))) for name in OPTIMIZER_NAMES
    )


def offload_rows(device: str) -> list[VerdictRow]:
    """Return the table of offload targets."""
    combination = Combination(device=device)
    return _merge_equal_rows(
        (name, across_strategies(replace(combination, offload=name))) for name in OFFLOADS
    )


def engine_rows(device: str) -> list[VerdictRow]:
    """Return the table of stages on TRL's trainers."""
    combination = Combination(device=device, engine="trl")
    return _merge_equal_rows(
        (name, across_strategies(replace(combination, stage=name))) for name in stage_names()
    )


def format_cell(verdict: Verdict) -> str:
    """Return a verdict as a table cell: yes, the values that make it work, or no."""
    if verdict.kind == "works":
        return YES
    names = ", ".join(dict.fromkeys(rule.name for rule in verdict.rules))
    if verdict.kind == "incompatible":
        return f"{NO} [{names}]"
    only = list(verdict.changes) == ["train.strategy"]
    text = str(verdict.changes["train.strategy"]) if only else format_overrides(verdict.changes)
    return f"{text} [{names}]"


def applied_rules(rows: Iterable[VerdictRow]) -> list[Rule]:
    """Return the rules that a table's cells name, in order."""
    rule_names = {rule.name for row in rows for verdict in row.verdicts for rule in verdict.rules}
    return [rule for rule in solver_rules() if rule.name in rule_names]


def _merge_equal_rows(labelled_rows: Iterable[tuple[str, tuple[Combination, ...]]]) -> list[VerdictRow]:
    """Return rows, merging those with equal verdicts."""
    rows: dict[tuple[str, ...], list[tuple[str, tuple[Combination, ...], tuple[Verdict, ...]]]] = {}
    for label, combinations in labelled_rows:
        verdicts = tuple(check(cell) for cell in combinations)
        # Verdicts with the same text are equal for a reader, so their rows are merged.
        rows.setdefault(tuple(map(format_cell, verdicts)), []).append((label, combinations, verdicts))
    return [
        VerdictRow(
            tuple(label for label, _, _ in equal_rows),
            tuple(cell for _, combinations, _ in equal_rows for cell in combinations),
            equal_rows[0][2],
        )
        for equal_rows in rows.values()
    ]


def row_label(labels: tuple[str, ...]) -> str:
    """Return a row's label.

    >>> row_label(("dora none", "dora nf4", "lora none", "lora nf4", "full none"))
    'none/nf4: dora, lora; none: full'
    """
    by_adapter: dict[str, list[str]] = {}
    for label in labels:
        adapter, _, quantization = label.partition(" ")
        by_adapter.setdefault(adapter, []).append(quantization)
    by_base: dict[str, list[str]] = {}
    for adapter, bases in by_adapter.items():
        by_base.setdefault("/".join(filter(None, bases)), []).append(adapter)
    return "; ".join(
        f"{base}: {', '.join(adapters)}" if base else ", ".join(adapters)
        for base, adapters in by_base.items()
    )


def format_rule(rule: Rule) -> str:
    """Return a rule as a Markdown list item: reason, evidence, source."""
    return f"* **{rule.name}**: {rule.describe()}. ({EVIDENCE_TEXTS[rule.evidence]}: {rule.source})"


def show_compatibility(stage: str, gpu: str | None, *, as_json: bool) -> None:
    """Print a stage's compatibility, as tables or as JSON.

    Args:
        stage: its name.
        gpu: a GPU by name, or ``cpu``; None: this machine.
        as_json: whether to print JSON.

    Raises:
        UserError: unknown stage or GPU.
    """
    device = (device_by_name(gpu) if gpu is not None else detect_devices()[0]).kind
    if as_json:
        echo_json(compatibility_cells(stage, device))
        return
    print_compatibility(stage, device, Terminal())


def print_compatibility(stage: str, device: str, console: Console) -> None:
    """Print a stage's compatibility tables for a device, and the rules that their cells name.

    Raises:
        UserError: unknown stage.
    """
    tables = {
        f"{stage} on {device} (quantization: adapters)": adapter_rows(stage, device),
        "train.optimizer": optimizer_rows(device),
        "train.offload": offload_rows(device),
        "train.engine=trl": engine_rows(device),
    }
    rules: dict[str, Rule] = {}
    for title, rows in tables.items():
        console.print(_rich_table(title, rows))
        rules |= {rule.name: rule for rule in applied_rules(rows)}
    for rule in rules.values():
        console.print(escape(format_rule(rule)), highlight=False)


def compatibility_cells(stage: str, device: str) -> list[dict[str, Any]]:
    """Return a stage's compatibility for JSON: one object per cell."""
    return [
        {
            "stage": stage,
            "device": device,
            "adapter": cell.adapter,
            "quantization": cell.quantization,
            "strategy": cell.strategy,
            "processes": cell.processes,
            "kind": verdict.kind,
            "changes": verdict.changes,
            "reason": verdict.reason,
            "repair": verdict.repair,
            "rules": [rule.name for rule in verdict.rules],
        }
        for cell in matrix_cells(stage, device)
        for verdict in [check(cell)]
    ]


def _rich_table(title: str, rows: list[VerdictRow]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    table.add_column("", overflow="fold", ratio=2)
    for strategy in STRATEGIES:
        table.add_column(strategy, overflow="fold", ratio=1)
    for row in rows:
        texts = (
            f"[{VERDICT_COLORS[verdict.kind]}]{escape(format_cell(verdict))}[/]" for verdict in row.verdicts
        )
        table.add_row(escape(row_label(row.labels)), *texts)
    return table
