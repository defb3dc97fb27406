"""Handmade evaluations and run directories, whose differences are known by construction."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.evaluation.intervals import suite_estimates
from finetune.evaluation.items import ItemResult
from finetune.evaluation.results import Evaluation, SuiteResult
from finetune.evaluation.suites import metrics_of
from finetune.recipe.runs import FORMAT

HOSTILE = "<script>alert(1)</script><img src=x onerror=y></section>\x1b[31m\u202egnp.exe"


def graded(
    name: str,
    scores: Sequence[float],
    *,
    purpose: str = "task",
    task: str = "completion",
    fingerprint: str = "equal",
    text: str = "answer",
    layout: str | None = None,
) -> SuiteResult:
    """Return the result of a suite with these scores."""
    items = [
        ItemResult(
            f"row {number}",
            f"row {number}",
            "",
            {"score": float(score)},
            {"prompt": f"{name} prompt {number}", "expected": "yes", "completion": f"{text} {score:g}"},
        )
        for number, score in enumerate(scores)
    ]
    settings = {"task": task, "purpose": purpose, "data": {"layout": layout}}
    return _suite(name, items, settings, fingerprint)


def texts(name: str, bits_per_byte: Sequence[float], *, purpose: str = "retention") -> SuiteResult:
    """Return the result of a perplexity suite of texts of 100 bytes."""
    items = [
        ItemResult(
            f"text {number}",
            f"text {number}",
            "",
            {"logp": -bits * 100 * 0.6931471805599453, "bytes": 100.0},
            {"text": f"text {number}"},
        )
        for number, bits in enumerate(bits_per_byte)
    ]
    return _suite(name, items, {"task": "perplexity", "purpose": purpose}, "equal")


def _suite(
    name: str, items: Sequence[ItemResult], settings: Mapping[str, Any], fingerprint: str
) -> SuiteResult:
    settings = {"description": name, "data": {"layout": None}, **settings}
    metrics, groups = suite_estimates(metrics_of(settings), items)
    return SuiteResult(name, settings, fingerprint, items, metrics, groups)


def evaluation(model: str, *suites: SuiteResult) -> Evaluation:
    return Evaluation(model, {"run": model}, {suite.suite: suite for suite in suites})


def share(right: int, total: int = 100) -> list[float]:
    """Return scores of which the first ``right`` are 1."""
    return [float(number < right) for number in range(total)]


def write_run(
    folder: Path,
    *,
    stage: str = "sft",
    status: str = "finished",
    settings: Mapping[str, Any] | None = None,
    losses: Sequence[float] = (2.0, 1.0),
    correct: Sequence[float] = (),
    prompt: str = "prompt",
) -> Path:
    """Write a run directory: record, recipe, metrics, samples and graded held-out completions."""
    folder.mkdir(parents=True)
    record = {
        "format": FORMAT,
        "status": status,
        "stage": stage,
        "recipe": "quickstart",
        "digest": "1a2b3c4d",
        "seed": 0,
        "steps": 2,
        "reload": {"model": {"base": "tiny"}},
        "metrics": {"tokens_per_second": 100, "eval/loss_after": losses[-1]},
        "seconds": {"train": 12.0, "load": 1.0},
        "peak_memory_bytes": 2**30,
        "parameters": {"trained": 1000, "total": 2000},
        "hardware": {"name": "a CPU"},
        "data": {"held_out_rows": {"a.jsonl": "1-9"}},
        "curves": {"loss": "training loss"},
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    values = {"seed": 0, "learning_rate": 0.001, "epochs": 3.0} | dict(settings or {})
    lines = "".join(f"  {key}: {value}\n" for key, value in values.items())
    (folder / "recipe.yaml").write_text(f"stage: {stage}\ntrain:\n{lines}", encoding="utf-8")
    logged = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    _write_lines(folder / "metrics.jsonl", logged)
    sample = {"prompt": f"sample of {prompt}", "expected": "yes", "before": "no", "after": folder.name}
    _write_lines(folder / "samples.jsonl", [sample])
    entries = [
        {
            "evaluation": "exact_match",
            "when": "after",
            "location": f"a.jsonl:{number}",
            "prompt": f"{prompt} {number}",
            "expected": "yes",
            "completion": "yes" if score else f"no from {folder.name}",
            "correct": bool(score),
        }
        for number, score in enumerate(correct)
    ]
    _write_lines(folder / "held_out.jsonl", entries)
    return folder


def _write_lines(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
