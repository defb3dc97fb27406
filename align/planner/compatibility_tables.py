"""``llm-align plan --compatibility``: which adapters, quantizations and strategies work together."""

import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.distributed.hardware import detect_devices, device_by_name
from finetune.distributed.strategies import STRATEGIES
from finetune.planner.compatibility_page import (
    VerdictRow,
    adapter_rows,
    applied_rules,
    engine_rows,
    format_cell,
    format_rule,
    matrix_cells,
    offload_rows,
    optimizer_rows,
    row_label,
)
from finetune.planner.solver import check
from finetune.recipe.compatibility import Rule

VERDICT_COLORS = {"works": "green", "changed": "yellow", "incompatible": "red"}


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
        click.echo(compatibility_json(stage, device))
        return
    print_compatibility(stage, device, Console())


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
        console.print(_table(title, rows))
        rules |= {rule.name: rule for rule in applied_rules(rows)}
    for rule in rules.values():
        console.print(escape(format_rule(rule)), highlight=False)


def compatibility_json(stage: str, device: str) -> str:
    """Return a stage's compatibility as JSON: one object per cell."""
    cells = [
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
    return json.dumps(cells, indent=1)


def _table(title: str, rows: list[VerdictRow]) -> Table:
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
