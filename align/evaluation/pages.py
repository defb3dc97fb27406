"""The pages of ``llm-align eval`` and ``llm-align compare``: self-contained HTML with SVG charts."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from math import inf, isfinite
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from align.evaluation.advice import TrainedRun
from align.evaluation.answers import Answers, common_results, item_answers
from align.evaluation.changes import PURPOSES, bar_scales
from align.evaluation.compare import Comparison, SuiteFigures
from align.evaluation.models import NOTHING, ComparedModel
from align.evaluation.pairs import PairChange
from align.evaluation.verdict import Verdict, make_verdict
from finetune.evaluation.figures import format_estimate, format_value
from finetune.evaluation.results import (
    EVALUATION_FILE,
    Estimate,
    Evaluation,
    SuiteResult,
    load_evaluation,
    save_evaluation,
)
from finetune.evaluation.sequential import Look
from finetune.recipe.errors import Problem
from finetune.recipe.runs import read_run_record
from finetune.training.atomic_files import locked_folder, write_text_atomically
from finetune.training.pages import page_template
from finetune.training.report import figure_svg, rewrite_report

FOLDER = Path(__file__).parent
REPORT = "report.html"
COLORS = ("#3b5bdb", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285")
"""Color of each model, as ``.m0`` to ``.m5`` of page_style.css."""
LINES = ("-", "--", "-.", ":")
"""Line styles, which a print in gray shows too."""
MOST_ANSWERS = 8
"""Prompts of a suite that a page shows, those with differing answers first."""
LONGEST_TEXT = 700
"""Characters of a prompt or an answer that a page shows."""
MOST_PAIRS = 30
"""Changes of pairs of models that a page shows."""
MOST_GROUPS = 12
"""Groups of a suite that a page shows."""


def comparison_page(comparison: Comparison) -> str:
    """Return the page of a comparison."""
    models = [
        {"letter": model.letter, "css": _css(index), "name": model.name, "about": _about(model)}
        for index, model in enumerate(comparison.models)
    ]
    css = {model["letter"]: model["css"] for model in models}
    answers = {figures.suite: figures.answers for figures in comparison.quality}
    answers |= {"samples.jsonl": comparison.samples}
    settings = {key: [model.setting_text(key) for model in comparison.models] for key in comparison.settings}
    held_out = {
        name: [NOTHING if value is None else f"{value:.4g}" for value in values]
        for name, values in comparison.held_out.items()
    }
    return page_template(FOLDER, "compare.html.j2").render(
        title=" · ".join(model.name for model in comparison.models),
        date=date.today().isoformat(),
        models=models,
        winner=comparison.winner,
        sentence=comparison.sentence,
        notes=comparison.notes,
        source=comparison.source,
        suites=[_compared_card(figures, models) for figures in comparison.quality],
        pairs=_pair_rows(comparison.pairs, css),
        num_pairs=len(comparison.pairs),
        recipes=_pair_rows(comparison.recipes, css),
        tables={
            "Settings that differ": settings,
            "Metrics of held-out rows": held_out,
            "Time, tokens, memory": comparison.costs,
        },
        curves=[_curves_svg(comparison.models, key, title) for key, title in comparison.curves.items()],
        answers=_answer_groups(answers, models),
    )


def publish_evaluation(
    folder: Path,
    evaluation: Evaluation,
    against: Evaluation | None,
    *,
    run: Path | None,
    looks: Mapping[str, Look] | None = None,
) -> Verdict | None:
    """Write an evaluation with its page, and the verdict to eval.json, run.json and the run's report.

    Args:
        folder: the folder of the evaluation.
        evaluation: the results of the model.
        against: those of the model that it is compared with; None: there is no new verdict.
        run: the model's run; None of a base.
        looks: last look at each suite that ``--until-decided`` has stopped.

    Raises:
        UserError: another process uses the run directory.
        StorageError: a file cannot be written.
    """
    if against is None:
        # A run that another one is compared with keeps the verdict of its own comparison.
        earlier = _stored_verdict(folder, evaluation)
        save_evaluation(folder, evaluation, more={"verdict": earlier} if earlier else None)
        write_evaluation_page(folder, evaluation, verdict=earlier)
        return None
    is_run = run is not None and (run / "run.json").is_file()
    verdict = make_verdict(
        against, evaluation, run=TrainedRun.of(run) if run is not None and is_run else None
    )
    record = verdict.record()
    save_evaluation(folder, evaluation, more={"verdict": record})
    write_evaluation_page(folder, evaluation, against, record)
    if run is not None and is_run:
        _store_verdict(run, record)
        rewrite_report(run)
    return verdict


def _stored_verdict(folder: Path, evaluation: Evaluation) -> Mapping[str, Any] | None:
    """Return the verdict of an earlier evaluation of the same model, None without one."""
    file = folder / EVALUATION_FILE
    if not file.is_file() or load_evaluation(folder).identity != evaluation.identity:
        return None
    verdict: Mapping[str, Any] | None = json.loads(file.read_text(encoding="utf-8")).get("verdict")
    return verdict


def _store_verdict(run: Path, verdict: Mapping[str, Any]) -> None:
    in_use = Problem(str(run), "another process uses this folder", "one process at a time", "wait")
    unwritable = Problem(str(run), "not writable", "a writable folder")
    with locked_folder(run, in_use=in_use, unwritable=unwritable):
        record = {**read_run_record(run), "verdict": verdict}
        write_text_atomically(run / "run.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write_evaluation_page(
    folder: Path,
    evaluation: Evaluation,
    against: Evaluation | None = None,
    verdict: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.html`` of an evaluation into its folder, and return its path.

    Args:
        folder: the folder of the evaluation.
        evaluation: the results of the model.
        against: those of the model that it is compared with.
        verdict: ``Verdict.record()`` of the two.

    Raises:
        StorageError: the file cannot be written.
    """
    both = [against, evaluation] if against is not None else [evaluation]
    names = ["before", "after"] if against is not None else [""]
    models = [
        {"letter": name, "css": _css(0 if index == len(both) - 1 else 1), "name": own.model}
        for index, (name, own) in enumerate(zip(names, both, strict=True))
    ]
    suites = [[own.suites.get(name) for own in both] for name in evaluation.suites]
    page = page_template(FOLDER, "eval.html.j2").render(
        title=evaluation.model,
        date=date.today().isoformat(),
        verdict=verdict,
        models=models,
        suites=[_suite_card(results, models) for results in suites],
        answers=_answer_groups(
            {
                name: item_answers(common_results(own))
                for name, own in zip(evaluation.suites, suites, strict=True)
            },
            models,
        ),
        measured=[_measured(result) for result in evaluation.suites.values()],
        identity=evaluation.identity,
    )
    path = folder / REPORT
    write_text_atomically(path, page)
    return path


def _pair_rows(pairs: Sequence[PairChange], css: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the rows of a table of changes; a recipe has the color of its first run."""
    scales = bar_scales([pair.change for pair in pairs])
    return [
        {
            **pair.change.record(scales[pair.change.unit]),
            "first": pair.first,
            "first_css": css[pair.first[0]],
            "second": pair.second,
            "second_css": css[pair.second[0]],
        }
        for pair in sorted(pairs, key=lambda pair: PURPOSES.index(pair.change.purpose))[:MOST_PAIRS]
    ]


def _css(index: int) -> str:
    return f"m{index % len(COLORS)}"


def _about(model: ComparedModel) -> str:
    if not model.record:
        return "base"
    base = model.record.get("reload", {}).get("model", {}).get("base", "")
    facts = (
        model.record["stage"],
        f"recipe {model.record['recipe']}",
        f"seed {model.record.get('seed')}",
        base,
    )
    return " · ".join(filter(None, facts))


def _compared_card(figures: SuiteFigures, models: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    rows = [
        ({"letter": model["letter"], "css": model["css"], "label": ""}, estimate)
        for model, estimate in zip(models, figures.estimates, strict=True)
    ]
    return _card(figures.suite, figures.metric, figures.purpose, rows)


def _suite_card(results: Sequence[SuiteResult | None], models: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return the card of a suite of an evaluation: its models, and the groups of the last one."""
    result = results[-1]
    assert result is not None
    rows = [
        (
            {"css": model["css"], "label": model["letter"] or result.headline[0]},
            None if own is None else own.headline[1],
        )
        for model, own in zip(models, results, strict=True)
    ]
    groups = sorted(result.groups.items(), key=lambda entry: entry[1].value)
    rows += [({"css": "group", "label": name}, estimate) for name, estimate in groups[:MOST_GROUPS]]
    card = _card(result.suite, result.headline[0], str(result.settings["purpose"]), rows)
    further = [f"{name} {format_estimate(estimate)}" for name, estimate in list(result.metrics.items())[1:]]
    hidden = len(groups) - MOST_GROUPS
    notes = [f"{hidden} further groups have higher figures."] if hidden > 0 else []
    return {
        **card,
        "description": result.settings.get("description", ""),
        "notes": [*further, *notes, *result.notes],
    }


def _card(
    name: str, metric: str, purpose: str, rows: Sequence[tuple[Mapping[str, str], Estimate | None]]
) -> dict[str, Any]:
    """Return a card with a bar for each estimate: proportions from 0 to 100 %, others from end to end."""
    present = [estimate for _, estimate in rows if estimate is not None]
    ends = [
        end for estimate in present for end in (estimate.low, estimate.high, estimate.value) if isfinite(end)
    ]
    percent = all(estimate.percent for estimate in present)
    low, high = (min(0.0, *ends), max(1.0, *ends)) if percent else (min(ends), max(ends))
    span = high - low or 1.0

    def position(value: float, end: float) -> float:
        return round(100 * ((value if isfinite(value) else end) - low) / span, 2)

    def row(about: Mapping[str, str], estimate: Estimate | None) -> dict[str, Any]:
        if estimate is None:
            return {**about, "value": NOTHING, "interval": "", "bar": None}
        bar = {
            "low": position(estimate.low, low),
            "point": position(estimate.value, low),
            "high": position(estimate.high, high),
        }
        value, _, interval = format_estimate(estimate).rpartition(" (")
        return {**about, "value": value, "interval": interval.removesuffix(")"), "bar": bar}

    return {
        "name": name,
        "metric": metric,
        "purpose": purpose,
        "rows": [row(about, estimate) for about, estimate in rows],
        "low": f"{100 * low:.0f} %" if percent else format_value(low, percent=False),
        "high": f"{100 * high:.0f} %" if percent else format_value(high, percent=False),
        "notes": [],
    }


def _measured(result: SuiteResult) -> dict[str, str]:
    estimate = result.headline[1]
    return {
        "name": result.suite,
        "items": f"{estimate.count:,}",
        "clusters": f"{estimate.clusters:,}",
        "seconds": f"{result.seconds:.1f}",
        "fingerprint": result.fingerprint,
    }


def _answer_groups(
    answers: Mapping[str, Sequence[Answers]], models: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Return the answers of each suite; a suite that scores texts has none."""
    return [
        _answer_group(name, entries, models)
        for name, entries in answers.items()
        if any(text for entry in entries for text in entry.texts)
    ]


def _answer_group(
    name: str, answers: Sequence[Answers], models: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    if len(models) == 1:
        answers = sorted(
            answers, key=lambda entry: [inf if score is None else score for score in entry.scores]
        )
    different = sum(entry.is_different for entry in answers)
    shown = answers[:MOST_ANSWERS]
    count = f"{len(answers):,} prompt{'s' if len(answers) != 1 else ''}"
    summary = f"{count}, different answers to {different:,}" if len(models) > 1 else count
    summary += f"; {len(shown)} are shown" if len(shown) < len(answers) else ""
    return {
        "name": name,
        "summary": summary,
        "entries": [
            {
                "prompt": _cut(entry.prompt),
                "expected": _cut(entry.expected),
                "differs": entry.is_different or len(models) == 1,
                "replies": _replies(entry, models),
            }
            for entry in shown
        ],
    }


def _replies(entry: Answers, models: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    scores = entry.scores or [None] * len(models)
    return [
        {"letter": model["letter"], "css": model["css"], "text": _cut(text) or "(empty)", **_mark(score)}
        for model, text, score in zip(models, entry.texts, scores, strict=True)
        if text is not None
    ]


def _mark(score: float | None) -> dict[str, str]:
    if score is None:
        return {"score": "", "tone": ""}
    if score in (0, 1):
        return {"score": "right" if score else "wrong", "tone": "good" if score else "bad"}
    return {"score": f"{score:.3g}", "tone": "unsure"}


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"


def _curves_svg(models: Sequence[ComparedModel], key: str, title: str) -> str:
    figure = Figure(figsize=(5.2, 2.7), layout="constrained")
    axes = figure.subplots()
    for index, model in enumerate(models):
        points = model.curve(key)
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps,
                values,
                LINES[index % len(LINES)],
                marker="o" if len(points) < 12 else "",
                markersize=3.5,
                color=COLORS[index % len(COLORS)],
                linewidth=1.5,
                label=model.letter,
            )
    axes.set(xlabel="step", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure_svg(figure)
