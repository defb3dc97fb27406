"""Run a pipeline: stage by stage, each on the runs of earlier ones; finished stages are skipped.

Heavy libraries are imported only when a stage needs them, so a finished pipeline returns at once.
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
    """The result of a pipeline.

    Attributes:
        directory: the pipeline's folder.
        record: content of pipeline.json.
        stages: the result of each stage, by its name in the pipeline.
        samples: one entry per prompt: ``prompt``, ``expected``, ``replies`` (stage -> text) and ``rewards``
            (reward model stage -> stage -> number).
    """

    directory: Path
    record: dict[str, Any]
    stages: dict[str, Result]
    samples: list[dict[str, Any]]

    @property
    def last(self) -> Result:
        """Return the result of the last stage."""
        return list(self.stages.values())[-1]


def run_pipeline(
    pipeline: Pipeline, console: Console, *, force: bool = False, command: str = ""
) -> PipelineResult:
    """Run the stages that are not finished, then write the report.

    Runs are identified by content: a run made outside the pipeline is reused.

    Args:
        pipeline: from ``load_pipeline``.
        console: console for progress output.
        force: start every stage over.
        command: command line for pipeline.json.

    Raises:
        UserError: invalid settings or data; nothing is written if the first stage is rejected.
        Interrupted: stopped by a signal; the same call resumes.
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
    """Raise UserError under torchrun or another launcher: each stage launches its own processes."""
    if (size := world().size) > 1:
        found = f"started by a launcher with {size} processes"
        repair = "run `llm-align run` without a launcher: every stage launches its train.processes processes"
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
    """Run one stage, or reuse its finished run, and record the result."""
    began = time.time()
    with _recorded(pipeline, entry, folder, first=not results):
        recipe, command = _at_its_turn(entry, results)
        result = run_stage(ready(recipe, console), console, force=force, command=command)
    folder.stage(entry.name, **_facts(result))
    if (result.directory / "run.json").stat().st_mtime < began:
        _say(console, f"already finished: {result.directory}")
    return result


@contextmanager
def _recorded(pipeline: Pipeline, entry: Entry, folder: PipelineDirectory, *, first: bool) -> Iterator[None]:
    """Record a stage's status, and prefix its errors with the stage's name."""

    def ended(status: str, **why: str) -> None:
        folder.stage(entry.name, status=status, stage=entry.stage, recipe=entry.recipe, **why)
        folder.update(status=status)

    ended("running")
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        ended("interrupted")
        text = str(stop) or "stopped; run the same command to resume"
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
    """Return a stage's recipe with the run folders it needs, and its standalone command line.

    Raises:
        UserError: files of a required run are missing.
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
    """Generate every model's completions of the same prompts, and write the report."""
    from align.pipeline.compare import compare
    from align.pipeline.report import write_report

    _say(console, "\nreport: generating every stage's completions of the same prompts")
    compare(pipeline, folder, results)
    folder.update(finished=now())
    write_report(pipeline, folder, results)


def _whole(folder: PipelineDirectory) -> bool:
    """Return whether an earlier run of the pipeline finished and wrote its report."""
    return folder.record.get("status") == "finished" and (folder.path / REPORT).is_file()


def _stopped(pipeline: Pipeline, entry: Entry, text: str) -> str:
    return f"{pipeline.name}, stage {entry.name} ({entry.title}): {text}"


@contextmanager
def _signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, also between stages, where there is no checkpoint to save."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # signal handlers can only be set in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
