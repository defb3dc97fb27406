"""``llm-align score``: score a file with a reward model, print the statistics and write the rows."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from align.reward.score_file import score_file, summary, write_rows
from align.reward.scorer import load_reward
from finetune.recipe.errors import Problem, UserError

SPREAD = ("mean", "deviation")


def score(run: Path, source: str, *, out: Path | None, as_json: bool) -> None:
    """Score the rows of a file with a finished reward model, print the statistics, and write the rows.

    Raises:
        UserError: not a reward model, no such file, unknown layout, or ``out`` is the input file.
    """
    if out is not None and Path(source).exists() and out.exists() and out.samefile(source):
        raise UserError(Problem(f"--out {out}", "the input file", "another path"))
    if out is not None and not out.resolve().parent.is_dir():
        raise UserError(
            Problem(f"--out {out}", f"no such folder: {out.resolve().parent}", "an existing folder")
        )
    rows = score_file(load_reward(run), source)
    if out is not None:
        write_rows(rows, out)
    facts = summary(rows)
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        _print(facts, out)


def _print(facts: dict[str, Any], out: Path | None) -> None:
    console = Console()
    table = Table()
    ordered = any("accuracy" in values for values in facts["rewards"].values())
    for column in ("reward", "scored", *SPREAD, *(("accuracy", "95 % interval") if ordered else ())):
        table.add_column(column, justify="left" if column == "reward" else "right", no_wrap=True)
    for name, values in facts["rewards"].items():
        table.add_row(name, *_cells(values))
    console.print(table)
    without = facts["without_reply"]
    told = f"{facts['rows']} rows" + (f", {without} without a reply to score" if without else "")
    console.print(told, highlight=False)
    if out is not None:
        console.print(f"written  {out}", highlight=False, soft_wrap=True)
    else:
        console.print("--out FILE.jsonl writes each row with its rewards", highlight=False)


def _cells(values: dict[str, Any]) -> list[str]:
    spread = [f"{values[key]:.3f}" if key in values else "" for key in SPREAD]
    order = []
    if "accuracy" in values:
        low, high = values["interval"]
        order = [f"{values['accuracy']:.1%}", f"{100 * low:.0f} to {high:.0%}"]
    return [str(values.get("completions", "")), *spread, *order]
