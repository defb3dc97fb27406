"""Compare runs: settings that differ, quality with intervals, curves, costs, answers, which is better."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.evaluation.answers import Answers, common_results, item_answers, sample_answers
from align.evaluation.changes import PURPOSES, estimate_record
from align.evaluation.models import NOTHING, ComparedModel, same_recipe, settings_that_differ
from align.evaluation.pairs import (
    PairChange,
    Quality,
    best_model,
    pair_changes,
    recipe_changes,
    with_direction,
)
from align.pipeline.report import format_duration
from finetune.evaluation.results import Estimate
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.terminal import command_line
from finetune.training.metrics import EVAL_PREFIX

EVALUATIONS, HELD_OUT_PROMPTS = "evaluations", "held-out prompts"
AFTER = "_after"
GRADED_METRICS = ("exact_match", "retention", "graders/", "classification/accuracy")


@dataclass(frozen=True)
class SuiteFigures:
    """The results of all models on a suite, or by a grader of held-out prompts.

    Attributes:
        suite: its name.
        purpose: task, retention or safety.
        metric: name of the headline.
        estimates: of each model, None of one without it.
        answers: to its items, those that differ first.
    """

    suite: str
    purpose: str
    metric: str
    estimates: Sequence[Estimate | None]
    answers: Sequence[Answers]


@dataclass(frozen=True)
class Comparison:
    """What a comparison of several models shows.

    Attributes:
        models: the models, named A, B, ...
        settings: values of the settings in which runs differ, one per model.
        source: what the quality comes from: evaluations or held-out prompts.
        quality: results by suite.
        pairs: changes of all pairs of models, corrected together.
        recipes: changes of all pairs of recipes with five seeds or more, named by the letters of their runs.
        winner: the model, or recipe, that is better than each of the others; "" if there is none.
        sentence: the result in one sentence.
        notes: what limits the comparison.
        held_out: final metrics of held-out rows: name -> value of each model.
        costs: time, tokens, memory: label -> a text for each model.
        curves: metric -> its title, of the curves that several runs have.
        samples: replies to the prompts of samples.jsonl that no suite has.
    """

    models: Sequence[ComparedModel]
    settings: Mapping[str, Sequence[Any]]
    source: str
    quality: Sequence[SuiteFigures]
    pairs: Sequence[PairChange]
    recipes: Sequence[PairChange]
    winner: str
    sentence: str
    notes: Sequence[str]
    held_out: Mapping[str, Sequence[float | None]]
    costs: Mapping[str, Sequence[str]]
    curves: Mapping[str, str]
    samples: Sequence[Answers]

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "sentence": self.sentence,
            "winner": self.winner,
            "notes": list(self.notes),
            "models": [
                {
                    "letter": model.letter,
                    "name": model.name,
                    "folder": str(model.folder),
                    "status": model.status,
                }
                for model in self.models
            ],
            "settings": {key: list(values) for key, values in self.settings.items()},
            "source": self.source,
            "quality": [
                {
                    "suite": figures.suite,
                    "purpose": figures.purpose,
                    "metric": figures.metric,
                    "results": [estimate_record(estimate) for estimate in figures.estimates],
                }
                for figures in self.quality
            ],
            "pairs": _pair_records(self.pairs),
            "recipes": _pair_records(self.recipes),
            "held_out": {name: list(values) for name, values in self.held_out.items()},
            "costs": {label: list(texts) for label, texts in self.costs.items()},
        }


def _pair_records(pairs: Sequence[PairChange]) -> list[dict[str, Any]]:
    return [{"first": pair.first, "second": pair.second, **pair.change.record(1.0)} for pair in pairs]


def compare_models(models: Sequence[ComparedModel]) -> Comparison:
    """Return the comparison of two or more models.

    Raises:
        UserError: runs of different stages without evaluations in common, or nothing is in common.
    """
    stages = sorted({str(model.record["stage"]) for model in models if model.record})
    source, quality = _common_quality(models, is_one_stage=len(stages) < 2)
    if len(stages) > 1 and not quality:
        actual = f"runs of different stages ({', '.join(stages)}): their losses measure different things"
        expected = "runs of one stage, or evaluations of the same suites"
        raise UserError(Problem("RUN", actual, expected, _evaluate(models)))
    curves = _common_curves(models) if len(stages) == 1 else {}
    samples = sample_answers([model.folder for model in models])
    if not quality and not curves and not samples:
        actual = "no suite, graded prompt, sample or curve is common to two of them"
        raise UserError(
            Problem("RUN", actual, "runs or evaluations with something in common", _evaluate(models))
        )
    directed = with_direction(quality)
    pairs = pair_changes([model.letter for model in models], directed)
    recipes = recipe_changes(models, directed)
    winner, sentence = _result(models, pairs, recipes)
    figures = [_figures(name, results) for name, results in quality.items()]
    graded = {entry.prompt for suite in figures for entry in suite.answers}
    return Comparison(
        models,
        settings_that_differ(models),
        source,
        sorted(figures, key=lambda entry: PURPOSES.index(entry.purpose)),
        pairs,
        recipes,
        winner,
        sentence,
        _notes(models, stages),
        _held_out_metrics(models, graded=source == HELD_OUT_PROMPTS) if len(stages) == 1 else {},
        model_costs(models),
        curves,
        [entry for entry in samples if entry.prompt not in graded],
    )


def _result(
    models: Sequence[ComparedModel], pairs: Sequence[PairChange], recipes: Sequence[PairChange]
) -> tuple[str, str]:
    """Return the winner and the result in one sentence: of recipes with enough seeds, else of models."""
    if task := [pair for pair in recipes if pair.change.purpose == "task"]:
        winner, sentence = best_model(task, unit="runs")
        return winner, f"Recipes, each by the letters of its runs: {sentence[0].lower()}{sentence[1:]}"
    if task := [pair for pair in pairs if pair.change.purpose == "task"]:
        return best_model(task)
    return "", _not_graded(models)


def _not_graded(models: Sequence[ComparedModel]) -> str:
    return f"Not decided: no two of them have graded answers to the same prompts; {_evaluate(models)}."


def _evaluate(models: Sequence[ComparedModel]) -> str:
    first = models[0].folder if models[0].record else models[0].name
    return f"evaluate each with the same suites, such as `{command_line('eval', first)}`"


def _common_quality(models: Sequence[ComparedModel], *, is_one_stage: bool) -> tuple[str, Quality]:
    """Return the results that two or more models have on the same items: of evaluations, else held-out."""
    sources = [(EVALUATIONS, [model.suites for model in models])]
    # Stages hold out rows of different kinds.
    sources += [(HELD_OUT_PROMPTS, [model.held_out for model in models])] if is_one_stage else []
    for source, suites in sources:
        names = dict.fromkeys(name for own in suites for name in own)
        results = {name: common_results([own.get(name) for own in suites]) for name in names}
        common = {name: own for name, own in results.items() if sum(entry is not None for entry in own) > 1}
        if common:
            return source, common
    return HELD_OUT_PROMPTS, {}


def _figures(name: str, results: Sequence[Any]) -> SuiteFigures:
    first = next(result for result in results if result is not None)
    estimates = [None if result is None else result.headline[1] for result in results]
    purpose, metric = str(first.settings["purpose"]), first.headline[0]
    return SuiteFigures(name, purpose, metric, estimates, item_answers(results))


def _common_curves(models: Sequence[ComparedModel]) -> dict[str, str]:
    """Return the metrics that two or more runs have logged, with the titles of their curves."""
    titles: dict[str, str] = {}
    for model in models:
        titles |= model.record.get("curves", {})
    logged = [{key for entry in model.logged for key in entry} for model in models]
    keys = dict.fromkeys(key for model in models for entry in model.logged for key in entry)
    common = [key for key in keys if sum(key in own for own in logged) > 1 and key not in ("step", "epoch")]
    order = list(titles)
    return {
        key: titles.get(key, key)
        for key in sorted(common, key=lambda key: order.index(key) if key in order else len(order))
    }


def _held_out_metrics(models: Sequence[ComparedModel], *, graded: bool) -> dict[str, list[float | None]]:
    """Return the metrics of held-out rows after training that two or more runs have.

    Args:
        models: the models.
        graded: whether the quality has those that are means over held-out prompts.
    """
    own = [model.record.get("metrics", {}) for model in models]
    names = dict.fromkeys(key for metrics in own for key in metrics)
    final = [name for name in names if name.startswith(EVAL_PREFIX) and name.endswith(AFTER)]
    if graded:
        final = [name for name in final if not name.removeprefix(EVAL_PREFIX).startswith(GRADED_METRICS)]
    common = [name for name in final if sum(name in metrics for metrics in own) > 1]
    return {_metric_label(models, name): [metrics.get(name) for metrics in own] for name in common}


def _metric_label(models: Sequence[ComparedModel], name: str) -> str:
    """Return a metric's name, with its number of rows if that is the same for all models."""
    metric = name.removesuffix(AFTER)
    counts = {model.record.get("cases", {}).get(metric) for model in models if model.record}
    label = metric.removeprefix(EVAL_PREFIX)
    count = counts.pop() if len(counts) == 1 else None
    return f"{label} ({count:,} rows)" if count else label


def _notes(models: Sequence[ComparedModel], stages: Sequence[str]) -> list[str]:
    notes = []
    for group in same_recipe(models):
        letters = ", ".join(model.letter for model in group)
        seeds = [str(model.seed) for model in group]
        if len(set(seeds)) > 1:
            notes.append(
                f"{letters} are runs of one recipe with the seeds {', '.join(seeds)}: their differences come "
                "from the seed."
            )
        else:
            notes.append(
                f"{letters} have the same settings and seed: their data, code or versions may differ."
            )
    if len(stages) > 1:
        notes.append(f"Stages {' and '.join(stages)}: curves and held-out losses are not compared.")
    notes += [
        f"{model.letter} is {model.status} at step {model.steps} of {model.record.get('steps', '?')}."
        for model in models
        if model.record and model.status != "finished"
    ]
    held_out = [model.record.get("data", {}).get("held_out_rows") for model in models if model.record]
    if len(stages) == 1 and any(rows != held_out[0] for rows in held_out):
        notes.append("The runs hold out different rows: their held-out losses are not comparable.")
    devices = {model.record.get("hardware", {}).get("name") for model in models if model.record}
    if len(devices) > 1:
        notes.append("The runs used different devices: time and memory are not comparable.")
    return notes


def model_costs(models: Sequence[ComparedModel]) -> dict[str, list[str]]:
    """Return the costs of models as texts, by label; rows that no model has are left out."""
    rows = {label: [function(model) for model in models] for label, function in COSTS.items()}
    return {label: texts for label, texts in rows.items() if set(texts) != {NOTHING}}


def _steps(model: ComparedModel) -> str:
    total = model.record.get("steps")
    return (
        NOTHING if total is None else f"{model.steps:,} of {total:,}" if model.steps < total else f"{total:,}"
    )


def _seconds(model: ComparedModel, phase: str = "") -> str:
    seconds: Mapping[str, float] = model.record.get("seconds", {})
    value = seconds.get(phase) if phase else sum(seconds.values()) if seconds else None
    return NOTHING if value is None else format_duration(value)


def _tokens(model: ComparedModel) -> str:
    """Return the tokens that were trained in the last start of the run."""
    rate = model.record.get("metrics", {}).get("tokens_per_second")
    seconds = model.record.get("seconds", {}).get("train")
    return NOTHING if rate is None or seconds is None else f"{round(rate * seconds, -2):,.0f}"


def _rate(model: ComparedModel) -> str:
    rate = model.record.get("metrics", {}).get("tokens_per_second")
    return NOTHING if rate is None else f"{rate:,}"


def _memory(model: ComparedModel) -> str:
    peak = model.record.get("peak_memory_bytes")
    return NOTHING if peak is None else f"{peak / 2**30:.2f} GiB"


def _parameters(model: ComparedModel) -> str:
    parameters: Mapping[str, Any] = model.record.get("parameters", {})
    return f"{parameters['trained']:,}" if parameters else NOTHING


def _device(model: ComparedModel) -> str:
    return str(model.record.get("hardware", {}).get("name", NOTHING))


COSTS: Mapping[str, Callable[[ComparedModel], str]] = {
    "status": lambda model: model.status,
    "steps": _steps,
    "total time": _seconds,
    "training time": lambda model: _seconds(model, "train"),
    "trained tokens": _tokens,
    "tokens/s": _rate,
    "peak memory": _memory,
    "trained parameters": _parameters,
    "device": _device,
}
