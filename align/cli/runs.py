"""Finished runs in the terminal: the summary of one, chat with it, and ``llm-align score``."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_templates.segments import Message, TemplateError
from finetune.evaluation.classification import Classification
from finetune.evaluation.classification_tables import classification_summary, classification_tables
from finetune.recipe.console import Terminal, error_terminal, working
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.terminal import command_line, echo, echo_json
from finetune.recipe.visible_text import visible
from finetune.training.result import Result

SAMPLE_CELL_WIDTH = 160
SPREAD_COLUMNS = ("mean", "std")


def print_summary(result: Result) -> None:
    """Print the summary of a finished run."""
    console = Terminal()
    for label, value in result.record["summary"].items():
        console.print(f"  {label}: [bold]{escape(value)}[/]", highlight=False, soft_wrap=True)
    if metrics := result.record.get("classification", {}).get("after"):
        print_classification(metrics, console)
    if result.samples:
        console.print(_samples_table(result))
    folder = result.directory
    console.print(
        f"result   {escape(str(result.adapter))}\nreport   {escape(str(folder / 'report.html'))}",
        highlight=False,
        soft_wrap=True,
    )
    is_reward_model = "heads" in result.record["reload"]
    words: tuple[object, ...] = ("score", folder, "FILE.jsonl") if is_reward_model else ("chat", folder)
    if "classification" in result.record:
        words = ("generate", folder, "FILE", "--out", "LABELED.csv")
    console.print(f"next     [bold]{escape(command_line(*words))}[/]", highlight=False, soft_wrap=True)


def result_json(result: Result) -> dict[str, Any]:
    """Return the result of a finished run for ``--json``."""
    record = result.record
    fields = {key: record.get(key) for key in ("status", "stage", "recipe", "steps", "finished_early")}
    paths = {"result": str(result.adapter), "report": str(result.directory / "report.html")}
    metrics = {"summary": record["summary"], "metrics": record.get("metrics", {})}
    return {"run": str(result.directory), **fields, **paths, **metrics}


def print_classification(metrics: Classification, console: Console) -> None:
    """Print the tables of a classifier's metrics, and a line with the accuracy and its interval."""
    for title, (header, *rows) in classification_tables(metrics).items():
        table = Table(title=escape(title), title_justify="left")
        for index, column in enumerate(header):
            table.add_column(escape(column), justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(classification_summary(metrics), highlight=False, soft_wrap=True)


def _samples_table(result: Result) -> Table:
    table = Table(show_lines=True, expand=False)
    has_expected = any(sample.get("expected") for sample in result.samples)
    columns = ["prompt", *(["expected"] if has_expected else []), "before", "after"]
    for column in columns:
        table.add_column(column, overflow="fold")
    for sample in result.samples:
        cells = [sample.get(column, "") for column in columns]
        table.add_row(
            *(escape(textwrap.shorten(visible(cell), SAMPLE_CELL_WIDTH, placeholder=" …")) for cell in cells)
        )
    return table


def generate_once(run: Path, prompt: str, *, max_new_tokens: int, temperature: float) -> str:
    """Generate a run's reply to one prompt.

    Raises:
        UserError: not the folder of a finished run.
    """
    with working(error_terminal(), "loading the model"):
        from finetune.training.loaded_model import load_finished_run

        loaded = load_finished_run(run)
    with working(error_terminal(), "generating the reply"):
        return loaded.reply(prompt, max_new_tokens=max_new_tokens, temperature=temperature)


def chat_loop(run: Path, *, max_new_tokens: int, temperature: float) -> None:
    """Chat in the terminal until an empty line or the end of input.

    Raises:
        UserError: not the folder of a finished run.
    """
    with working(error_terminal(), "loading the model"):
        from finetune.training.loaded_model import load_finished_run

        loaded = load_finished_run(run)
    echo(f"Chatting with {run}; empty line to quit, /new to start a new conversation.")
    history: list[Message] = []
    for question in _read_questions():
        if question == "/new":
            history = []
            continue
        turns = [*history, Message("user", question)]
        try:
            reply = loaded.reply(turns, max_new_tokens=max_new_tokens, temperature=temperature)
        # Single-turn templates cannot render a history: each question starts a new conversation.
        except TemplateError:
            turns = turns[-1:]
            reply = loaded.reply(turns, max_new_tokens=max_new_tokens, temperature=temperature)
        echo(reply)
        history = [*turns, loaded.encoder.parse_reply(reply)]


def _read_questions() -> Iterator[str]:
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def score_and_print(run: Path, source: str, *, out: Path | None, as_json: bool) -> None:
    """Score the rows of a file with a finished reward model, print the statistics, and write the rows.

    Raises:
        UserError: not a reward model, no such file, unknown layout, or ``out`` is the input file.
    """
    from align.reward.score_file import score_file, score_statistics, write_scored_rows
    from align.reward.scorer import load_reward_model

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
        echo_json(statistics)
    else:
        _print_reward_table(statistics, out)


def _print_reward_table(statistics: dict[str, Any], out: Path | None) -> None:
    console = Terminal()
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
        table.add_row(escape(name), *_statistics_cells(values))
    console.print(table)
    num_without_reply = statistics["without_reply"]
    row_count = f"{statistics['rows']} rows" + (
        f", {num_without_reply} without a reply to score" if num_without_reply else ""
    )
    console.print(row_count, highlight=False)
    if out is not None:
        console.print(f"written  {escape(str(out))}", highlight=False, soft_wrap=True)
    else:
        console.print("--out FILE.jsonl writes each row with its rewards", highlight=False)


def _statistics_cells(values: dict[str, Any]) -> list[str]:
    spread_cells = [f"{values[key]:.3f}" if key in values else "" for key in SPREAD_COLUMNS]
    accuracy_cells = []
    if "accuracy" in values:
        low, high = values["interval"]
        accuracy_cells = [f"{values['accuracy']:.1%}", f"{100 * low:.0f} to {high:.0%}"]
    return [str(values.get("completions", "")), *spread_cells, *accuracy_cells]
