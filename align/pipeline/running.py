"""A pipeline at work: stage after stage, each on the runs of those before it; finished ones are not repeated.

Nothing heavy is imported before a stage needs it, so that a finished pipeline answers at once.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape

from align.pipeline.directory import REPORT, PipelineDirectory, now
from align.pipeline.entry import Entry
from align.pipeline.plan import Pipeline
from align.start import ready
from finetune.planning.world import world
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.training.launch import run_stage
from finetune.training.result import Result
from finetune.training.stops import Interrupted, NotFiniteError


@dataclass(frozen=True)
class PipelineResult:
    """A pipeline's folder and what it says.

    Attributes:
        directory: the folder.
        record: pipeline.json.
        stages: the result of each stage, by its name in the pipeline.
        samples: a line a prompt: ``prompt``, ``expected``, ``replies`` (stage -> text) and ``rewards`` (stage
            of a reward model -> stage -> number).
    """

    directory: Path
    record: dict[str, Any]
    stages: dict[str, Result]
    samples: list[dict[str, Any]]

    @property
    def last(self) -> Result:
        """Return the result of the last stage: the model that all of it was for."""
        return list(self.stages.values())[-1]


def run_pipeline(
    pipeline: Pipeline, console: Console, *, force: bool = False, command: str = ""
) -> PipelineResult:
    """Run the stages that are not finished, then write the report of them all.

    A stage's run is found by its content, as everywhere: one that was made without the pipeline counts.

    Args:
        pipeline: what ``load_pipeline`` gave.
        console: where progress is shown.
        force: every stage starts over.
        command: the words that started it, for the record.

    Raises:
        UserError: the user's mistakes; nothing is written where the first stage is refused.
        Interrupted: a signal came; the same call goes on from there.
        NotFiniteError: a stage's loss or gradient became NaN or infinite.
    """
    _refuse_world(pipeline)
    folder = PipelineDirectory(pipeline)
    with folder.locked(), _signals():
        before = dict(folder.record.get("stages", {})) if _whole(folder) else {}
        folder.begin(pipeline, command)
        results: dict[str, Result] = {}
        for number, entry in enumerate(pipeline.entries, start=1):
            _say(console, f"\n[{number}/{len(pipeline.entries)}] {entry.name}: {entry.title}")
            results[entry.name] = _run(pipeline, entry, results, folder=folder, console=console, force=force)
        if folder.record["stages"] != before:
            _conclude(pipeline, folder, results, console)
        folder.update(status="finished", finished=folder.record.get("finished") or now())
    return PipelineResult(folder.path, folder.record, results, folder.samples())


def _refuse_world(pipeline: Pipeline) -> None:
    """Raise UserError under a launcher of the user's: each stage starts the processes that it needs."""
    if (size := world().size) > 1:
        found = f"a launcher has started {size} processes"
        repair = "llm-align run without it: every stage starts the processes that train.processes asks for"
        raise UserError(Problem(f"pipeline {pipeline.name}", found, "one process", repair))


def _run(
    pipeline: Pipeline,
    entry: Entry,
    results: dict[str, Result],
    *,
    folder: PipelineDirectory,
    console: Console,
    force: bool,
) -> Result:
    """Run one stage, or find it finished, and write what became of it."""
    began = time.time()
    with _recorded(pipeline, entry, folder, first=not results):
        recipe, command = _at_its_turn(entry, results)
        result = run_stage(ready(recipe, console), console, force=force, command=command)
    folder.stage(entry.name, **_facts(result))
    if (result.directory / "run.json").stat().st_mtime < began:
        _say(console, f"finished before: {result.directory}")
    return result


@contextmanager
def _recorded(pipeline: Pipeline, entry: Entry, folder: PipelineDirectory, *, first: bool) -> Iterator[None]:
    """Write that a stage runs, and how it ended if it did not come to its end; say which stage it was."""

    def ended(status: str, **why: str) -> None:
        folder.stage(entry.name, status=status, stage=entry.stage, recipe=entry.recipe, **why)
        folder.update(status=status)

    ended("running")
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        ended("interrupted")
        text = str(stop) or "stopped; the same command goes on"
        raise Interrupted(_stopped(pipeline, entry, text)) from stop
    except NotFiniteError as error:
        ended("failed", reason=str(error))
        raise NotFiniteError(_stopped(pipeline, entry, str(error))) from error
    except UserError as error:
        ended("failed", reason=str(error))
        if first:
            folder.withdraw()
        raise UserError([entry.placed(problem) for problem in error.problems]) from error


def _at_its_turn(entry: Entry, results: dict[str, Result]) -> tuple[Recipe, str]:
    """Return a stage's recipe with the runs that it needs, and the command that does the same alone.

    Raises:
        UserError: a run's files are not there any more.
    """
    start = str(results[entry.start].directory) if entry.start else None
    rewards = {name: str(results[name].directory) for name in entry.rewards}
    recipe = entry.load(start=start, rewards=rewards)
    return recipe, entry.command(start=start, rewards=rewards)


def _facts(result: Result) -> dict[str, Any]:
    record = result.record
    return {
        "status": "finished",
        "stage": record["stage"],
        "recipe": record["recipe"],
        "run": str(result.directory),
        "digest": record["digest"],
        "seconds": round(sum(record["seconds"].values()), 2),
        "finished": record["finished"],
        "files": record["files"],
    }


def _conclude(
    pipeline: Pipeline, folder: PipelineDirectory, results: dict[str, Result], console: Console
) -> None:
    """Let every model answer the same prompts, and write the report."""
    from align.pipeline.compare import compare
    from align.pipeline.report import write_report

    _say(console, "\nreport: the same prompts, answered by the model of every stage")
    compare(pipeline, folder, results)
    folder.update(finished=now())
    write_report(pipeline, folder, results)


def _whole(folder: PipelineDirectory) -> bool:
    """Tell whether an earlier run of the pipeline has come to its end and its report is there."""
    return folder.record.get("status") == "finished" and (folder.path / REPORT).is_file()


def _stopped(pipeline: Pipeline, entry: Entry, text: str) -> str:
    return f"{pipeline.name}, stage {entry.name} ({entry.title}): {text}"


@contextmanager
def _signals() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C between the stages too, where no checkpoint is due."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # signals can be set in the main thread alone
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
