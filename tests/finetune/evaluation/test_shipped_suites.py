"""Shipped suites: each loads and reads a handmade row of its layout, or all of its own data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from layout_rows import ROWS

from finetune.evaluation.metrics import Metric
from finetune.evaluation.rows import read_items, suite_source
from finetune.evaluation.suites import SUITES, NamedSuite, load_suite, suite_names
from finetune.graders.loading import load_grader
from finetune.recipe.discovery import looks_local

NAMES = sorted(suite_names())
LOCAL = [name for name in NAMES if looks_local(load_suite(name).settings.data.source)]


def with_row(suite: NamedSuite, folder: Path) -> NamedSuite:
    """Return the suite with the handmade row of its layout as its data."""
    layout = suite.settings.data.layout
    assert layout is not None
    row = ROWS[layout]
    if layout == "truthfulqa":  # the suite is for the rows of the Hub
        targets = {"choices": ["blue", "green"], "labels": [1, 0]}
        row = {"question": "What color?", "mc1_targets": targets, "mc2_targets": targets}
    (folder / "row.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = suite.settings.data.model_copy(update={"source": str(folder / "row.jsonl")})
    return replace(suite, settings=suite.settings.model_copy(update={"data": data}))


@pytest.mark.parametrize("name", NAMES)
def test_suite(name: str, tmp_path: Path) -> None:
    suite = load_suite(name)
    settings = suite.settings
    items = read_items(suite if name in LOCAL else with_row(suite, tmp_path))
    assert items and all(isinstance(metric, Metric) for metric in suite.metrics)
    if settings.task == "choice":
        assert all(len(item.choices) >= 2 and item.correct for item in items)
        assert settings.style == "text", "a suite's prompts are continued without a template"
    elif settings.task == "completion":
        assert all(item.prompt for item in items)
    if settings.grader is not None:
        if settings.grader == "instructions":
            pytest.importorskip("langdetect")
        assert load_grader(settings.grader, settings.grader_options, where=name).parameters
    assert suite.path.read_text(encoding="utf-8").startswith("# "), "source and license"


def test_data_of_our_own_says_so() -> None:
    assert len(NAMES) > 20 and len(LOCAL) == 10
    korean = [name for name in LOCAL if name.startswith("ko-")]
    assert len(korean) == 5
    for name in korean:
        suite = load_suite(name)
        items = read_items(suite)
        assert (
            "rows of our own" in suite.settings.description
            and "not the benchmark" in suite.settings.description
        )
        assert len(items) == 20 == len({(item.prompt, item.choices) for item in items})
        # A model that always takes the same position is not above chance.
        if name != "ko-truthfulqa":
            assert max(sum(item.correct == (index,) for item in items) for index in range(4)) <= 6
        assert Path(suite_source(suite)).parent == SUITES / "data"


def test_refusal_rows_are_pairs() -> None:
    items = read_items(load_suite("tiny-refusal"))
    labels = [item.columns["label"] for item in items]
    assert labels == ["safe", "unsafe"] * 20


def test_skills_of_the_bundled_model_are_all_tasks_but_stories() -> None:
    rows = (SUITES.parent / "tiny/data/sft_held_out.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = {json.loads(row)["task"] for row in rows}
    used = {
        item.columns["task"]
        for name in ("tiny-skills", "tiny-korean")
        for item in read_items(load_suite(name))
    }
    assert tasks - used == {"story", "story_ko"}
