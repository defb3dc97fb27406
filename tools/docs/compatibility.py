"""Compatibility tables as Markdown, from the rules of stages, adapters and strategies."""

from collections.abc import Iterator

from align.planner.compatibility import (
    DEVICE_KINDS,
    NO,
    YES,
    VerdictRow,
    adapter_rows,
    engine_rows,
    format_cell,
    format_rule,
    offload_rows,
    optimizer_rows,
    row_label,
)
from finetune.distributed.solver import collected_rules, solver_rules
from finetune.distributed.strategies import STRATEGIES
from finetune.recipe.compatibility import Rule
from finetune.recipe.discovery import stage_names
from tools.docs.markdown import code, table


def _stage_table(stage: str, device: str) -> str:
    """Return one stage's table on a kind of device."""
    return _verdicts("quantization: adapters", adapter_rows(stage, device))


def all_tables() -> str:
    """Return every cell of every stage, and all rules with their sources."""
    sections = []
    for device in DEVICE_KINDS:
        sections.append(f"## On {'CPUs' if device == 'cpu' else 'GPUs'}\n")
        for stages, text in _stages_by_table(device):
            sections.append(f"### {', '.join(stages)}\n\n{text}")
        for title, rows in (
            ("optimizer", optimizer_rows(device)),
            ("train.offload", offload_rows(device)),
            ("train.engine=trl", engine_rows(device)),
        ):
            sections.append(f"### {title}\n\n{_verdicts(title, rows)}")
    in_tables = {rule.name: rule for rule in solver_rules()}
    of_recipes = [rule for rule in collected_rules() if rule.name not in in_tables]
    sections.append("## Rules\n\n" + "\n".join(map(format_rule, in_tables.values())) + "\n")
    sections.append("## Rules of recipes\n\n" + "\n".join(map(_recipe_rule, of_recipes)) + "\n")
    return "\n".join(sections)


def _stages_by_table(device: str) -> Iterator[tuple[list[str], str]]:
    """Yield each table with all stages that have it."""
    tables: dict[str, list[str]] = {}
    for stage in stage_names():
        tables.setdefault(_stage_table(stage, device), []).append(stage)
    for text, stages in tables.items():
        yield stages, text


def _verdicts(title: str, rows: list[VerdictRow]) -> str:
    return table((title, *STRATEGIES), ((row_label(row.labels), *_cells(row)) for row in rows))


def _cells(row: VerdictRow) -> list[str]:
    """Return a row's cells; a long one that repeats the first refers to it."""
    first, *others = (_code_values(format_cell(verdict)) for verdict in row.verdicts)
    return [first, *(f"as {STRATEGIES[0]}" if cell == first != YES else cell for cell in others)]


def _code_values(cell: str) -> str:
    values, bracket, rules = cell.partition(" [")
    return f"{' '.join(map(code, values.split()))} [{rules}" if bracket and values != NO else cell


def _recipe_rule(rule: Rule) -> str:
    stages = rule.when.get("stage", ())
    assert isinstance(stages, tuple)
    return format_rule(rule) + (f" Stages: {', '.join(stages)}." if stages else "")
