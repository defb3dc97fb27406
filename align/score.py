"""``llm-align score``: score a file with a reward model, print the statistics and write the rows."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from align.reward.score_file import score_file, score_statistics, write_scored_rows
from align.reward.scorer import load_reward_model
from finetune.recipe.errors import Problem, UserError

SPREAD_COLUMNS = ("mean", "std")


def score_and_print(run: Path, source: str, *, out: Path | None, as_json: bool) -> None:
    """Score the rows of a file with a finished reward model, print the statistics, and write the rows.

    Raises:
        UserError: not a reward model, no such file, unknown layout, or ``out`` is the input file.
    """
    if out is not None and Path(source).exists() and out.exists() and out.samefile(source):
        raise UserError(Problem(f"--out {out}", "the input file", "another path"))
    # Checked before scoring, which may take long.
    if out is not None and not out.resolve().parent.is_dir():
        raise UserError(
            Problem(f"--out {out}", f"no such folder: {out.resolve().parent}", "an existing folder")
        )
    rows = score_file(load_reward_model(run), source)
    if out is not None:
        write_scored_rows(rows, out)
    statistics = score_statistics(rows)
    if as_json:
        print(json.dumps(statistics, indent=1, ensure_ascii=False))
    else:
        _print_reward_table(statistics, out)


def _print_reward_table(statistics: dict[str, Any], out: Path | None) -> None:
    console = Console()
    table = Table()
    has_accuracy = any("accuracy" in values for values in statistics["rewards"].values())
    for column in (
        "reward",
        "scored",
        *SPREAD_COLUMNS,
        *(("accuracy", "95 % interval") if has_accuracy else ()),
    ):
        table.add_column(column, justify="left" if column == "reward" else "right", no_wrap=True)
    for name, values in statistics["rewards"].items():
        table.add_row(name, *_statistics_cells(values))
    console.print(table)
    num_without_reply = statistics["without_reply"]
    row_count = f"{statistics['rows']} rows" + (
        f", {num_without_reply} without a reply to score" if num_without_reply else ""
    )
    console.print(row_count, highlight=False)
    if out is not None:
        console.print(f"written  {out}", highlight=False, soft_wrap=True)
    else:
        console.print("--out FILE.jsonl writes each row with its rewards", highlight=False)


def _statistics_cells(values: dict[str, Any]) -> list[str]:
    spread_cells = [f"{values[key]:.3f}" if key in values else "" for key in SPREAD_COLUMNS]
    accuracy_cells = []
    if "accuracy" in values:
        low, high = values["interval"]
        accuracy_cells = [f"{values['accuracy']:.1%}", f"{100 * low:.0f} to {high:.0%}"]
    return [str(values.get("completions", "")), *spread_cells, *accuracy_cells]
