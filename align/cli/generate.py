"""``llm-align generate``: a completion or a label for every row of a file."""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from align.cli.completion import complete_file, complete_model, complete_template
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.silence import silence_libraries
from finetune.recipe.terminal import echo, echo_json

if TYPE_CHECKING:
    from align.generation.generate_file import GeneratedRows
    from align.generation.model_source import ModelSource
    from align.generation.settings import GenerateSettings

SECONDS_BETWEEN_LINES = 5.0
EPILOG = """\b
Examples:
  llm-align generate sft-alpaca questions.jsonl --out answers.jsonl
  llm-align generate sft-classify tickets.csv --out labeled.csv
  llm-align generate tiny reviews.csv --column prompt=review --choices good,bad --limit 20
"""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="MODEL", shell_complete=complete_model)
@click.argument("source", metavar="FILE", shell_complete=complete_file)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Output: .jsonl, .csv or .tsv; default: a .jsonl file in this folder.",
)
@click.option("--choices", metavar="A,B,C", help="Choose one of these labels instead of generating text.")
@click.option(
    "--choices-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The labels, one per line.",
)
@click.option("--no-choices", is_flag=True, help="Generate text with a run that was trained on labels.")
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="OURS=THEIRS",
    help="Name a column of the file, such as prompt=question; as in data.columns.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Answer the first N rows only.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Maximum tokens."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0.0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0: greedy decoding.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the samples.")
@click.option(
    "--template",
    metavar="T",
    shell_complete=complete_template,
    help="Template of a base; default: its tokenizer's chat template, or plain.",
)
@click.option("--force", is_flag=True, help="Replace the output of another command.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def generate(model: str, source: str, out: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Generate a completion, or choose a label, for every row of FILE with a run or a base.

    FILE is what --data takes; its rows need a prompt only. The output has all columns of FILE and the result,
    one row per row. The same command continues after an interruption.
    """
    silence_libraries()
    from align.generation.generate_file import generate_rows
    from align.generation.model_source import ModelSource
    from align.generation.settings import GenerateSettings

    origin = ModelSource.of(model, template=options["template"])
    choices = read_choices(options["choices"], options["choices_file"], options["no_choices"])
    if choices is None and not options["no_choices"]:
        choices = origin.labels
    settings = GenerateSettings(
        choices, options["max_new_tokens"], options["temperature"], options["seed"], options["limit"]
    )
    path = out or Path(f"{Path(source).name.split('.')[0]}.{origin.label}.jsonl")
    _print_header(origin, settings)
    generated = generate_rows(
        origin,
        source,
        settings,
        columns=parse_columns(options["columns"]),
        out=path,
        force=force,
        progress=ProgressLines(),
    )
    if as_json:
        echo_json(
            {"out": str(path), "columns": generated.columns, "notes": generated.notes, **generated.metrics}
        )
    else:
        _print_result(generated, path)


def read_choices(given: str | None, file: Path | None, none: bool) -> Sequence[str] | None:
    """Return the labels of --choices or --choices-file; None without them.

    Raises:
        UserError: more than one of the options, or no such file.
    """
    if sum((given is not None, file is not None, none)) > 1:
        actual = "more than one of --choices, --choices-file and --no-choices"
        raise UserError(Problem("--choices", actual, "one of them"))
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                Problem(
                    f"--choices-file {file}", f"cannot be read: {error}", "a text file, one label per line"
                )
            ) from error
        return [line.strip() for line in text.splitlines() if line.strip()]
    return None if given is None else [label.strip() for label in given.split(",")]


def parse_columns(options: Sequence[str]) -> dict[str, str]:
    """Return the mapping of --column options; raises UserError for one without ``=``."""
    pairs = [option.partition("=") for option in options]
    for (ours, equals, theirs), option in zip(pairs, options, strict=True):
        if not (ours and equals and theirs):
            expected = "OURS=THEIRS, such as prompt=question"
            raise UserError(Problem("--column", f"'{option}'", expected))
    return {ours: theirs for ours, _, theirs in pairs}


class ProgressLines:
    """Prints a line to standard error every few seconds: rows, rate, time left."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, done: int, total: int, rate: float) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and done < total:
            return
        self.last = now
        left = f", {_duration((total - done) / rate)} left" if done < total else ""
        echo(f"{done:,} of {total:,} rows, {rate:.1f} rows/s{left}", err=True)


def _duration(seconds: float) -> str:
    """Return a duration in words.

    >>> [_duration(seconds) for seconds in (7.4, 100, 7300)]
    ['7 s', '1 min 40 s', '2 h 1 min']
    """
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def _print_header(model: "ModelSource", settings: "GenerateSettings") -> None:
    """Print the model and the choices to standard error, before anything is loaded."""
    if model.note:
        echo(model.note, err=True)
    if settings.choices is not None:
        shown = ", ".join(settings.choices[:8]) + (", ..." if len(settings.choices) > 8 else "")
        echo(f"choices  {len(settings.choices)}: {shown}", err=True)


def _print_result(generated: "GeneratedRows", path: Path) -> None:
    from align.cli.runs import print_classification
    from finetune.recipe.console import Terminal

    console = Terminal()
    for note in generated.notes:
        console.print(f"!! {escape(note)}", highlight=False, soft_wrap=True)
    metrics: Any = generated.metrics
    if "exact_match" in metrics:
        low, high = metrics["interval"]
        console.print(
            f"exact match {metrics['exact_match']:.1%} (95 % interval {100 * low:.0f} to {high:.0%}, "
            f"{metrics['rows']:,} rows)",
            highlight=False,
        )
    elif metrics:
        print_classification(metrics, console)
    names = json.dumps(generated.columns, ensure_ascii=False)[1:-1].replace('"', "")
    console.print(
        f"written  {escape(shlex.quote(str(path)))}: the rows of the file with {names}",
        highlight=False,
        soft_wrap=True,
    )
