"""``llm-align eval``: results of a run or a base on suites, compared with another model."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from align.cli.completion import complete_model, complete_suite, complete_template
from finetune.evaluation.figures import format_estimate
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.silence import silence_libraries
from finetune.recipe.terminal import echo, echo_json

if TYPE_CHECKING:
    from align.evaluation.evaluate import EvaluationResult
    from align.evaluation.until_decided import SequentialResult
    from finetune.evaluation.results import Evaluation

SECONDS_BETWEEN_LINES = 5.0
EPILOG = """\b
Examples:
  llm-align eval sft-quickstart                          its held-out rows, against its base
  llm-align eval sft-alpaca --suite truthfulqa,xstest    published benchmarks
  llm-align eval sft-alpaca --suite mine.yaml --against dpo-hh
  llm-align eval tiny --suite tiny-general --json
"""


@click.command("eval", epilog=EPILOG)
@click.argument("model", metavar="MODEL", shell_complete=complete_model)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="S,...",
    shell_complete=complete_suite,
    help="Suites: names, YAML files, or held-out; default: the run's held-out rows.",
)
@click.option(
    "--against",
    metavar="MODEL",
    shell_complete=complete_model,
    help="Run or base to compare with; default: what the run started from.",
)
@click.option(
    "--judge",
    metavar="JUDGE",
    help="Judge of preference suites: run=REWARD_RUN, function=FILE.py:NAME, or endpoint=FILE.yaml.",
)
@click.option("--alone", is_flag=True, help="Compare with nothing.")
@click.option(
    "--require",
    type=click.Choice(("better", "not-worse")),
    help="Exit status 4 unless the verdict is this.",
)
@click.option(
    "--until-decided",
    is_flag=True,
    help="Stop each suite as soon as one of the models is shown to be better.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most N items of each suite.")
@click.option(
    "--template",
    metavar="T",
    shell_complete=complete_template,
    help="Template of a base; default: its tokenizer's chat template, or plain.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the cached answers; default: in the user's cache.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(model: str, suites: tuple[str, ...], as_json: bool, cache: Path | None, **options: Any) -> None:
    """Evaluate a run or a base on suites, with 95 % intervals, and compare it with another model.

    Answers are cached: the same command continues after an interruption, and answers at once when it is done.
    """
    silence_libraries()
    from align.evaluation.evaluate import plan_evaluation, run_plan
    from align.evaluation.until_decided import run_until_decided

    plan = plan_evaluation(
        model,
        suites=[name.strip() for text in suites for name in text.split(",") if name.strip()],
        against=options["against"],
        alone=options["alone"],
        limit=options["limit"],
        template=options["template"],
        judge=options["judge"],
    )
    for note in plan.notes:
        echo(f"!! {note}", err=True)
    sequential: Sequence[SequentialResult] = ()
    if options["until_decided"]:
        result, sequential = run_until_decided(plan, cache=cache, progress=ProgressLines())
    else:
        result = run_plan(plan, cache=cache, progress=ProgressLines())
    if as_json:
        echo_json(_as_json(result, sequential))
    else:
        _print(result, sequential)
    if options["require"] is not None:
        _check(result, options["require"])


class ProgressLines:
    """Prints a line to standard error every few seconds: suite, items, rate."""

    def __init__(self) -> None:
        self.last = self.start = time.monotonic()

    def __call__(self, suite: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            echo(f"  {suite}: {done:,} of {total:,} items, {now - self.start:.0f} s", err=True)


def _as_json(result: "EvaluationResult", sequential: Sequence["SequentialResult"]) -> dict[str, Any]:
    return {
        "until_decided": [
            {"suite": entry.suite, "metric": entry.metric.name, "total": entry.total, **vars(entry.look)}
            for entry in sequential
        ],
        "folder": str(result.folder),
        "verdict": None if result.verdict is None else result.verdict.record(),
        "models": [_model_as_json(evaluation) for evaluation in result.evaluations],
        "notes": list(result.notes),
    }


def _model_as_json(evaluation: "Evaluation") -> dict[str, Any]:
    suites = {
        name: {
            "metrics": {key: vars(estimate) for key, estimate in suite.metrics.items()},
            "items": len(suite.items),
            "seconds": suite.seconds,
            "notes": list(suite.notes),
        }
        for name, suite in evaluation.suites.items()
    }
    return {"model": evaluation.model, "suites": suites}


def _check(result: "EvaluationResult", requirement: Any) -> None:
    from align.evaluation.verdict import check_required

    if result.verdict is None:
        raise UserError(
            Problem("--require", "no other model", "a comparison of two models", "--against MODEL")
        )
    check_required(result.verdict, [requirement])


def _print(result: "EvaluationResult", sequential: Sequence["SequentialResult"]) -> None:
    from finetune.recipe.console import Terminal

    console = Terminal()
    table = Table()
    models = [escape(evaluation.model) for evaluation in result.evaluations]
    for number, column in enumerate(("suite", "metric", *models, "items")):
        table.add_column(column, justify="right" if number > 1 else "left", overflow="fold")
    for name, suite in result.evaluations[0].suites.items():
        for number, metric in enumerate(suite.metrics):
            cells = [
                format_estimate(evaluation.suites[name].metrics[metric]) for evaluation in result.evaluations
            ]
            first = (escape(name), f"{len(suite.items):,}") if number == 0 else ("", "")
            table.add_row(first[0], escape(metric), *cells, first[1])
    console.print(table)
    for evaluation in result.evaluations:
        for name, suite in evaluation.suites.items():
            for note in suite.notes:
                text = f"!! {evaluation.model}, {name}: {note}"
                console.print(escape(text), highlight=False, soft_wrap=True)
    for decided in sequential:
        console.print(escape(decided.sentence), highlight=False, soft_wrap=True)
    if result.verdict is not None:
        console.print(f"verdict  {escape(result.verdict.sentence)}", highlight=False, soft_wrap=True)
        if result.verdict.action:
            console.print(f"next     {escape(result.verdict.action)}", highlight=False, soft_wrap=True)
    page = result.folder / "report.html"
    console.print(f"report   {escape(str(page))}", highlight=False, soft_wrap=True)
