"""Run a pipeline: stage by stage, each on the runs of earlier ones; finished stages are skipped.

Heavy libraries are imported only when a stage needs them, so a finished pipeline returns at once.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape

from align.pipeline.directory import REPORT_FILE, PipelineDirectory, PipelineResult, utc_now
from align.pipeline.entries import StageEntry
from align.pipeline.plan import Pipeline, row_problems
from align.required_runs import resolve_required_runs
from finetune.distributed.interrupts import Interrupted, NotFiniteError, OutputClosed
from finetune.distributed.rank import dist_info
from finetune.recipe.disk import StorageError
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import FINISHED, STOPPED
from finetune.training.launch import launch_stage
from finetune.training.result import Result


def run_all_stages(
    pipeline: Pipeline,
    console: Console,
    *,
    force: bool = False,
    accept_changed_code: bool = False,
    command: str = "",
) -> PipelineResult:
    """Run the stages that are not finished, then write the report.

    Runs are identified by content: a run made outside the pipeline is reused.

    Args:
        pipeline: from ``load_pipeline``.
        console: console for progress output.
        force: start every stage over.
        accept_changed_code: resume interrupted stages although files of their user functions have changed.
        command: command line for pipeline.json.

    Raises:
        UserError: invalid settings or rows of any stage; nothing is written. Later, an error of a stage.
        Interrupted: stopped by a signal; the same call resumes.
        NotFiniteError: a stage's loss or gradient became NaN or infinite.
    """
    _check_no_launcher(pipeline)
    folder = PipelineDirectory(pipeline)
    _check_rows(pipeline, folder, force=force)
    with folder.locked(), _sigterm_as_interrupt():
        recorded_stages = dict(folder.record.get("stages", {})) if _is_complete(folder) else {}
        folder.write_initial_record(pipeline, command)
        results: dict[str, Result] = {}
        for position, entry in enumerate(pipeline.entries, start=1):
            _print_status(console, f"\n[{position}/{len(pipeline.entries)}] {entry.name}: {entry.title}")
            launch = partial(
                launch_stage, console=console, force=force, accept_changed_code=accept_changed_code
            )
            results[entry.name] = _run_entry(
                pipeline, entry, results, folder=folder, console=console, launch=launch
            )
        # No stage has run anew: samples and report are those of the same runs.
        if folder.record["stages"] != recorded_stages:
            _write_comparison(pipeline, folder, results, console)
        folder.update(status="finished", finished=folder.record.get("finished") or utc_now())
    return PipelineResult(folder.path, folder.record, results, folder.samples())


def _check_rows(pipeline: Pipeline, folder: PipelineDirectory, *, force: bool) -> None:
    """Raise UserError if rows of any stage cannot be used; those of finished stages are not read again."""
    stages = {} if force else folder.record.get("stages", {})
    entries = [entry for entry in pipeline.entries if stages.get(entry.name, {}).get("status") != FINISHED]
    if problems := row_problems(entries, pipeline.recipes):
        raise UserError(problems)


def _check_no_launcher(pipeline: Pipeline) -> None:
    """Raise UserError under torchrun or another launcher: each stage launches its own processes."""
    if (world_size := dist_info().world_size) > 1:
        actual = f"started by a launcher with {world_size} processes"
        repair = (
            "run `llm-align run` without a launcher: every stage launches its train.num_processes processes"
        )
        raise UserError(Problem(f"pipeline {pipeline.name}", actual, "one process", repair))


def _run_entry(
    pipeline: Pipeline,
    entry: StageEntry,
    results: dict[str, Result],
    *,
    folder: PipelineDirectory,
    console: Console,
    launch: Callable[..., Result],
) -> Result:
    """Run one stage, or reuse its finished run, and record the result."""
    started_at = time.time()
    with _record_status(pipeline, entry, folder, first=not results):
        recipe, command = _resolve_entry(entry, results)
        result = launch(resolve_required_runs(recipe, console), command=command)
    folder.record_stage(entry.name, **_stage_record(result))
    # Untouched since: the stage was finished before. Wall clock time, as in the file's mtime.
    if (result.directory / "run.json").stat().st_mtime < started_at:
        _print_status(console, f"already finished: {result.directory}")
    return result


@contextmanager
def _record_status(
    pipeline: Pipeline, entry: StageEntry, folder: PipelineDirectory, *, first: bool
) -> Iterator[None]:
    """Record a stage's status, and prefix its errors with the stage's name."""

    def set_status(status: str, **fields: str) -> None:
        folder.record_stage(entry.name, status=status, stage=entry.stage, recipe=entry.recipe, **fields)
        folder.update(status=status)

    set_status("running")
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        is_closed = isinstance(stop, OutputClosed)
        set_status(STOPPED if is_closed else "interrupted")
        text = str(stop) or "stopped; run the same command to resume"
        kind = OutputClosed if is_closed else Interrupted
        raise kind(_stop_message(pipeline, entry, text)) from stop
    except NotFiniteError as error:
        set_status("failed", error=str(error))
        raise NotFiniteError(_stop_message(pipeline, entry, str(error))) from error
    except StorageError as error:
        # The disk may have no room for this either; without a lock, `running` is read as `stopped`.
        with suppress(StorageError):
            set_status(STOPPED, error=str(error))
        raise StorageError([entry.with_stage_name(problem) for problem in error.problems]) from error
    except UserError as error:
        set_status("failed", error=str(error))
        if first:
            # Nothing has run yet: leave no folder of a pipeline that never started.
            folder.remove_if_new()
        # The same class: its exit status is another one if a check of the result failed.
        raise type(error)([entry.with_stage_name(problem) for problem in error.problems]) from error


def _resolve_entry(entry: StageEntry, results: dict[str, Result]) -> tuple[Recipe, str]:
    """Return a stage's recipe with the run folders it needs, and its standalone command line.

    Raises:
        UserError: files of a required run are missing.
    """
    init_from = str(results[entry.init_from].directory) if entry.init_from else None
    rewards = {name: str(results[name].directory) for name in entry.rewards}
    recipe = entry.load(init_from=init_from, rewards=rewards)
    return recipe, entry.command(init_from=init_from, rewards=rewards)


def _stage_record(result: Result) -> dict[str, Any]:
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


def _write_comparison(
    pipeline: Pipeline, folder: PipelineDirectory, results: dict[str, Result], console: Console
) -> None:
    """Generate every model's completions of the same prompts, and write the report."""
    from align.pipeline.compare import compare_stages
    from align.pipeline.report import write_pipeline_report

    _print_status(console, "\nreport: generating every stage's completions of the same prompts")
    compare_stages(pipeline, folder, results)
    folder.update(finished=utc_now())
    write_pipeline_report(pipeline, folder, results)


def _is_complete(folder: PipelineDirectory) -> bool:
    """Return whether an earlier run of the pipeline finished and wrote its report."""
    return folder.record.get("status") == "finished" and (folder.path / REPORT_FILE).is_file()


def _stop_message(pipeline: Pipeline, entry: StageEntry, text: str) -> str:
    return f"{pipeline.name}, stage {entry.name} ({entry.title}): {text}"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, also between stages, where there is no checkpoint to save."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous_handler = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Python allows signal handlers only in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _print_status(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
