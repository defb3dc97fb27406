"""report.html is self-contained and escapes text of models and data."""

import json
import re

import pytest
from fixture_types import Tune

from finetune.training.metric_specs import SUPERVISED_METRICS
from finetune.training.report import write_report
from finetune.training.result import Result
from finetune.training.run_directory import RunDirectory

pytestmark = pytest.mark.plots


@pytest.fixture
def result(tune: Tune) -> Result:
    return tune("run", train__evaluate_every=1, train__learning_rate=0.0123)


def page(result: Result) -> str:
    return (result.directory / "report.html").read_text(encoding="utf-8")


def test_curves_samples_and_recipe_are_there(result: Result) -> None:
    html = page(result)
    assert html.count("<svg") == html.count("</svg>") == 4  # two losses, rate, norm
    assert "<h2>Samples</h2>" in html and "Add the numbers." in html
    assert "learning_rate: 0.0123" in html and "command line" in html
    assert "transformers" in html and "a test" in html


def test_report_is_self_contained(result: Result) -> None:
    html = page(result)
    assert re.findall(r"<(?:script|link|img|iframe|object)\b|@import|url\((?!#)", html) == []
    assert [url for url in re.findall(r'(?:src|href)="([^"]*)"', html) if not url.startswith("#")] == []


def test_model_and_data_text_is_escaped(result: Result, make_recipe) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    entry = {"prompt": evil, "expected": evil, "before": evil, "after": evil, "ended_with_eos": True}
    (result.directory / "samples.jsonl").write_text(json.dumps(entry) + "\n")
    run = RunDirectory(result.directory, make_recipe(), result.record["digest"])
    run.record["command"] = evil
    write_report(run, SUPERVISED_METRICS.logged_keys)
    html = page(result)
    assert "<script>" not in html and "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5


def test_training_rows_as_samples_are_called_so(tune: Tune) -> None:
    assert "training rows: no held-out split" in page(tune("run", data__held_out=0))
