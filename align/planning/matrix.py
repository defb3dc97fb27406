"""``llm-align plan --compatibility``: which adapters, quantizations and strategies work together."""

import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.planning.compatibility import Rule
from finetune.planning.devices import device as device_named
from finetune.planning.devices import this_machine
from finetune.planning.matrix import (
    Row,
    adapter_rows,
    cell_text,
    cells,
    engine_rows,
    offload_rows,
    optimizer_rows,
    row_name,
    rule_line,
    rules_in,
)
from finetune.planning.solver import STRATEGIES, judge

COLOURS = {"works": "green", "changed": "yellow", "cannot": "red"}


def show_matrix(stage: str, gpu: str | None, *, as_json: bool) -> None:
    """Print a stage's compatibility, as tables or as JSON.

    Args:
        stage: its name.
        gpu: a GPU by name, or ``cpu``; None: this machine.
        as_json: whether to print JSON.

    Raises:
        UserError: unknown stage or GPU.
    """
    device = (device_named(gpu) if gpu is not None else this_machine()[0]).kind
    if as_json:
        click.echo(matrix_json(stage, device))
        return
    print_matrix(stage, device, Console())


def print_matrix(stage: str, device: str, console: Console) -> None:
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
        rules |= {rule.name: rule for rule in rules_in(rows)}
    for rule in rules.values():
        console.print(escape(rule_line(rule)), highlight=False)


def matrix_json(stage: str, device: str) -> str:
    """Return a stage's compatibility as JSON: one object per cell."""
    found = [
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
        for cell in cells(stage, device)
        for verdict in [judge(cell)]
    ]
    return json.dumps(found, indent=1)


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    table.add_column("", overflow="fold", ratio=2)
    for strategy in STRATEGIES:
        table.add_column(strategy, overflow="fold", ratio=1)
    for row in rows:
        texts = (f"[{COLOURS[verdict.kind]}]{escape(cell_text(verdict))}[/]" for verdict in row.verdicts)
        table.add_row(escape(row_name(row.names)), *texts)
    return table
