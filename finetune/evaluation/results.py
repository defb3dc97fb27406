"""Results of suites, and the file in which an evaluation keeps them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.evaluation.items import ItemResult
from finetune.recipe.disk import OUTPUT_REPAIR, writing
from finetune.recipe.errors import Problem, UserError
from finetune.training.atomic_files import read_jsonl, write_text_atomically

EVALUATION_FILE = "eval.json"
ITEMS_FOLDER = "items"
"""One JSON Lines file per suite: every item with its answer and values."""
FORMAT = 1


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: of all items.
        low: lower end of the interval.
        high: upper end.
        count: items that it was computed from.
        clusters: independent clusters among them.
        percent: whether it is a proportion.
    """

    value: float
    low: float
    high: float
    count: int
    clusters: int
    percent: bool = True


@dataclass(frozen=True)
class SuiteResult:
    """A model's results on a suite.

    Attributes:
        suite: name of the suite.
        settings: the suite's settings as plain values; ``suites.metrics_of`` returns its metrics.
        fingerprint: digest of items and settings: equal ones can be compared item by item.
        items: results of the items.
        metrics: by name, the headline first.
        groups: the headline of each group of items, {} without groups.
        seconds: of the computation; answers from the cache cost none.
        notes: lines on what was found, such as contamination.
    """

    suite: str
    settings: Mapping[str, Any]
    fingerprint: str
    items: Sequence[ItemResult]
    metrics: Mapping[str, Estimate]
    groups: Mapping[str, Estimate] = field(default_factory=dict)
    seconds: float = 0.0
    notes: Sequence[str] = ()

    @property
    def headline(self) -> tuple[str, Estimate]:
        """Return name and estimate of the first metric."""
        return next(iter(self.metrics.items()))


@dataclass(frozen=True)
class Evaluation:
    """A model's results on several suites.

    Attributes:
        model: the name for people: of a run, a base, a folder or an endpoint's model.
        identity: what identifies the weights and the template.
        suites: by name.
    """

    model: str
    identity: Mapping[str, Any]
    suites: Mapping[str, SuiteResult]


def save_evaluation(folder: Path, evaluation: Evaluation, *, more: Mapping[str, Any] | None = None) -> None:
    """Write ``eval.json`` and the items of each suite.

    Results of other suites that the folder has of the same model are kept.

    Args:
        folder: is created if it does not exist.
        evaluation: the results.
        more: further fields of eval.json, such as the verdict.

    Raises:
        StorageError: the folder cannot be written.
    """
    with writing(folder, repair=OUTPUT_REPAIR):
        (folder / ITEMS_FOLDER).mkdir(parents=True, exist_ok=True)
    earlier = load_evaluation(folder) if (folder / EVALUATION_FILE).is_file() else None
    suites = dict(evaluation.suites)
    if earlier is not None and earlier.identity == evaluation.identity:
        suites = {**earlier.suites, **suites}
    for name, result in suites.items():
        lines = (json.dumps(asdict(item), ensure_ascii=False, default=str) for item in result.items)
        write_text_atomically(folder / ITEMS_FOLDER / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    content = {
        "format": FORMAT,
        "model": evaluation.model,
        "identity": evaluation.identity,
        "suites": {name: _suite_record(result) for name, result in suites.items()},
        **(more or {}),
    }
    text = json.dumps(content, ensure_ascii=False, indent=1, default=str)
    write_text_atomically(folder / EVALUATION_FILE, text)


def load_evaluation(folder: Path) -> Evaluation:
    """Read an evaluation that ``save_evaluation`` wrote.

    Raises:
        UserError: the folder has none, or it is damaged.
    """
    file = folder / EVALUATION_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        suites = {name: _read_suite(folder, name, record) for name, record in content["suites"].items()}
        return Evaluation(content["model"], content["identity"], suites)
    except (OSError, ValueError, KeyError, TypeError) as error:
        actual = f"cannot be read: {type(error).__name__}: {error}"
        repair = f"delete {folder}: `llm-align eval` writes it again, from its cache of answers"
        raise UserError(Problem(str(file), actual, "the record of an evaluation", repair)) from error


def _suite_record(result: SuiteResult) -> dict[str, Any]:
    record = asdict(result)
    del record["items"]
    return record


def _read_suite(folder: Path, name: str, record: Mapping[str, Any]) -> SuiteResult:
    entries = read_jsonl(folder / ITEMS_FOLDER / f"{name}.jsonl")
    estimates = {
        kind: {key: Estimate(**value) for key, value in record[kind].items()}
        for kind in ("metrics", "groups")
    }
    return SuiteResult(**{**record, **estimates, "items": [ItemResult(**entry) for entry in entries]})
