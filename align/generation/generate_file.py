"""Generate a completion, or choose a label, for every row of a file."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.generation.model_source import ModelSource
from align.generation.output_file import OutputFile
from align.generation.prompt_file import PromptFile, PromptRow, read_prompts
from align.generation.settings import GenerateSettings, check_labels, unknown_labels
from finetune.data.files import Source, source_fingerprint
from finetune.evaluation.classification import classification_metrics
from finetune.evaluation.small_samples import wilson_interval
from finetune.recipe.discovery import local_path
from finetune.recipe.errors import Problem, UserError

ROWS_PER_WINDOW = 128
"""Rows that are sorted by length, computed and stored at once: what a kill loses at most."""
Progress = Callable[[int, int, float], None]
"""Receives the rows that are done, all rows, and rows per second."""


@dataclass(frozen=True)
class GeneratedRows:
    """The rows of a file with their results.

    Attributes:
        rows: each row's own columns and the results.
        columns: the names of the result columns.
        metrics: accuracy and others, if rows have a reply of their own; else {}.
        notes: lines on what was found in the rows.
        seconds: time of the computation, without loading.
        out: the file that has the rows, if one was asked for.
    """

    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[str]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    seconds: float = 0.0
    out: Path | None = None


def generate_rows(
    model: ModelSource,
    source: Source,
    settings: GenerateSettings,
    *,
    columns: Mapping[str, str] | None = None,
    out: Path | None = None,
    force: bool = False,
    progress: Progress = lambda done, total, rate: None,
) -> GeneratedRows:
    """Answer every row of a source, or continue where the same call was interrupted.

    Args:
        model: run or base.
        source: file, folder, Hub id, or Python's rows.
        settings: what decides the results.
        columns: ``{our name: the file's name}``; the run's own mapping serves where its columns exist.
        out: JSON Lines or CSV by its suffix; None: the rows are returned only.
        force: replace the output of another call.
        progress: called after each window of rows.

    Raises:
        UserError: the rows, the choices or the output cannot be used.
    """
    if settings.choices is not None:
        check_labels(settings.choices)
    prompts = read_prompts(source, columns=columns, inherited=model.columns, limit=settings.limit)
    renamed = _result_names(prompts.names, settings.names)
    if out is None:
        results = _compute(model, prompts.rows, settings, [], progress, lambda rows: None)
        return _with_metrics(prompts, results, settings, renamed)
    _refuse_input(out, source)
    facts = {"model": model.identity, "data": source_fingerprint(source), **asdict(settings)}
    facts |= {
        "columns": dict(columns or {}),
        "choices": None if settings.choices is None else [*settings.choices],
    }
    file = OutputFile(out, facts)
    with file.locked():
        if force:
            file.remove()
        if record := file.finished():
            return _finished(prompts, record, out)
        start = time.monotonic()
        results = _compute(model, prompts.rows, settings, file.results(), progress, file.append)
        generated = _with_metrics(prompts, results, settings, renamed)
        seconds = time.monotonic() - start
        record = {"rows": len(results), "seconds": round(seconds, 1), "columns": list(renamed.values())}
        file.finish(generated.rows, {**record, "notes": list(generated.notes), "metrics": generated.metrics})
    return GeneratedRows(generated.rows, generated.columns, generated.metrics, generated.notes, seconds, out)


def _finished(prompts: PromptFile, record: Mapping[str, Any], out: Path) -> GeneratedRows:
    """Return the record of a finished output; its rows are in the file."""
    return GeneratedRows((), record["columns"], record["metrics"], record["notes"], record["seconds"], out)


def _refuse_input(out: Path, source: Source) -> None:
    path = local_path(source) if isinstance(source, str) else None
    if path is not None and out.exists() and out.samefile(path):
        raise UserError(Problem(f"--out {out}", "the input file", "another path"))


def _result_names(names: Sequence[str], results: Sequence[str]) -> dict[str, str]:
    """Return the column of each result: its name, or ``predicted_...`` if the rows have one of this name."""
    return {name: f"predicted_{name}" if name in names else name for name in results}


def _compute(
    model: ModelSource,
    rows: Sequence[PromptRow],
    settings: GenerateSettings,
    results: list[dict[str, Any]],
    progress: Progress,
    store: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Return the results of all rows: those there are, and those of the rows after them, window by window."""
    results = list(results)
    if len(results) >= len(rows):
        return results
    # Imported here: a finished output is answered without torch.
    from align.generation.answers import Answerer

    answerer = Answerer(model.load(), settings)
    start, first = time.monotonic(), len(results)
    for offset in range(first, len(rows), ROWS_PER_WINDOW):
        window = list(enumerate(rows[offset : offset + ROWS_PER_WINDOW], offset))
        asked = [(number, row) for number, row in window if row.prompt is not None]
        answers = dict(
            zip((number for number, _ in asked), answerer.answer(asked) if asked else [], strict=True)
        )
        blank = dict.fromkeys(settings.names)
        computed = [answers.get(number, blank) for number, _ in window]
        store(computed)
        results += computed
        progress(len(results), len(rows), (len(results) - first) / (time.monotonic() - start))
    return results


def _with_metrics(
    prompts: PromptFile,
    results: Sequence[Mapping[str, Any]],
    settings: GenerateSettings,
    renamed: Mapping[str, str],
) -> GeneratedRows:
    rows = [
        {**row.columns, **{renamed[name]: value for name, value in result.items()}}
        for row, result in zip(prompts.rows, results, strict=True)
    ]
    notes = list(prompts.notes)
    if blank := sum(row.prompt is None for row in prompts.rows):
        notes.append(f"{blank:,} rows have no prompt, and no result")
    notes += [
        f"the rows have a column '{name}': the result is in '{column}'"
        for name, column in renamed.items()
        if name != column
    ]
    if settings.choices is None and (cut := sum(row.get("finish_reason") == "length" for row in results)):
        notes.append(f"{cut:,} completions reached --max-new-tokens and are cut off")
    graded = [
        (row.expected.strip(), result)
        for row, result in zip(prompts.rows, results, strict=True)
        if row.expected is not None and row.expected.strip() and row.prompt is not None
    ]
    metrics: Mapping[str, Any] = {}
    if graded and settings.choices is None:
        metrics = _exact_match([(gold, result["completion"]) for gold, result in graded])
    elif graded and settings.choices is not None:
        labels = [label.strip() for label in settings.choices]
        gold = [label for label, _ in graded]
        probabilities = np.array([[*result["probabilities"].values()] for _, result in graded])
        metrics = classification_metrics(gold, probabilities, labels)
        notes += unknown_labels(gold, labels)
    return GeneratedRows(rows, list(renamed.values()), metrics, notes)


def _exact_match(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the share of completions that equal the row's own reply, with its interval."""
    share = sum(gold == completion for gold, completion in pairs) / len(pairs)
    return {"rows": len(pairs), "exact_match": share, "interval": list(wilson_interval(share, len(pairs)))}
