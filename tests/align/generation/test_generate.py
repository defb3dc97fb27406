"""`generate` on a run that classifies and on its base: outputs, resumption, metrics, and the run's report."""

import csv
import json
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from align import generate, load_recipe, run
from align.cli import main
from align.generation import answers, generate_file
from finetune.recipe.errors import UserError
from finetune.training.result import Result

LABELS = ("card", "card lost", "배송")
"""One is a prefix of another; one is Korean; their tokens are not of equal number."""
ROWS = [{"text": f"Ticket {number}", "label": LABELS[number % 3]} for number in range(30)]
FAST = {
    "model.precision": "float32",
    "data.held_out": 9,
    "data.max_length": 128,
    "train.max_steps": 2,
    "train.batch_size": 4,
    "evaluate.samples": 1,
    "evaluate.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def classifier(
    base_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    figures: Callable[[], AbstractContextManager[None]],
) -> Result:
    folder = tmp_path_factory.mktemp("classifier") / "run"
    unseen = {"text": "Ticket 99", "label": "none of them"}
    held_out = [*ROWS[:8], unseen]
    settings = {**FAST, "data.held_out": held_out}
    recipe = load_recipe("classify", base=str(base_folder), data=ROWS, out=folder, settings=settings)
    with figures():
        return run(recipe)


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.csv"
    lines = [f"{row['text']},{row['label']}\n" for row in ROWS[:7]]
    path.write_text("text,label\n" + "".join(lines) + '"",card\n', encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def classified_rows(result: Result) -> list[dict[str, Any]]:
    rows = rows_of(result.directory / "held_out.jsonl")
    return [row for row in rows if (row["evaluation"], row["when"]) == ("classification", "after")]


def test_the_run_classifies_its_held_out_rows(classifier: Result) -> None:
    found = classifier.record["classification"]
    assert sorted(found["labels"]) == sorted(LABELS)
    metrics = found["after"]
    assert metrics["rows"] == 9 and len(metrics["confusion"]) == 4 and len(metrics["confusion"][0]) == 3
    assert metrics["classes"][3]["label"] == "none of them" and metrics["classes"][3]["recall"] == 0.0
    recorded = classifier.record["metrics"]
    assert recorded["eval/classification/accuracy_after"] == metrics["accuracy"]
    assert recorded["eval/classification/macro_f1_before"] == found["before"]["macro_f1"]
    classified = classified_rows(classifier)
    assert [row["expected"] for row in classified] == [*(row["label"] for row in ROWS[:8]), "none of them"]
    correct = sum(row["expected"] == row["completion"] for row in classified)
    assert correct / 9 == pytest.approx(metrics["accuracy"])


def test_the_report_has_tables_and_the_picture(classifier: Result) -> None:
    page = (classifier.directory / "report.html").read_text(encoding="utf-8")
    for title in ("Classes", "Confusion matrix", "Calibration"):
        assert f"Classification of held-out rows: {title}" in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) > 2 and ">배송</text>" in pictures[-1], "labels of the picture are texts"


def test_the_same_labels_by_generate(classifier: Result, tickets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    generated = generate(classifier.directory, tickets, choices=LABELS, out=out)
    with out.open(encoding="utf-8", newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [row["label"] for row in written] == [row["label"] for row in ROWS[:7]] + ["card"]
    assert generated.columns == ["predicted_label", "probabilities"] and generated.out == out
    by_location = {row["location"]: row for row in classified_rows(classifier)}
    for number, row in enumerate(written[:7], 1):
        probabilities = json.loads(row["probabilities"])
        assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-5)
        trained = by_location[f"row {number} of data.held_out"]
        assert row["predicted_label"] == trained["completion"]
        assert probabilities[row["predicted_label"]] == pytest.approx(trained["probability"], abs=2e-6)
    assert written[7]["predicted_label"] == "" and "1 rows have no prompt, and no result" in generated.notes
    assert generated.metrics["rows"] == 7 and len(generated.metrics["confusion"]) == 3


def test_a_killed_command_continues_where_it_was(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_file, "ROWS_PER_WINDOW", 4)
    rows = [{"prompt": f"Say {'a' * (number % 5)} {number}"} for number in range(11)]
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0, "seed": 4, "template": "plain"}
    expected = generate(str(base_folder), rows, out=tmp_path / "whole.jsonl", **options)
    answered = answers.Answerer.answer
    counts: list[int] = []

    def killed(self: answers.Answerer, asked: Any) -> Any:
        counts.append(len(asked))
        if len(counts) == 3:
            raise KeyboardInterrupt
        return answered(self, asked)

    with monkeypatch.context() as patch:
        patch.setattr(answers.Answerer, "answer", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(str(base_folder), rows, out=tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists() and counts == [4, 4, 3]
    with pytest.raises(UserError, match="seed 4 there, 5 now"):
        generate(str(base_folder), rows, out=tmp_path / "out.jsonl", **{**options, "seed": 5})
    resumed = generate(str(base_folder), rows, out=tmp_path / "out.jsonl", **options)
    assert resumed.rows == expected.rows
    assert rows_of(tmp_path / "out.jsonl") == rows_of(tmp_path / "whole.jsonl") == expected.rows
    assert len({row["completion"] for row in expected.rows}) > 3
    monkeypatch.setattr(answers.Answerer, "answer", killed)
    again = generate(str(base_folder), rows, out=tmp_path / "out.jsonl", **options)
    assert counts == [4, 4, 3] and again.metrics == {} and again.columns == ["completion", "finish_reason"]
    with pytest.raises(UserError, match="limit null there, 3 now"):
        generate(str(base_folder), rows, out=tmp_path / "out.jsonl", limit=3, **options)


def test_exact_match_of_completions(base_folder: Path) -> None:
    rows = [{"prompt": "a", "completion": "x"}, {"prompt": "b"}]
    generated = generate(str(base_folder), rows, max_new_tokens=3, template="plain")
    assert generated.metrics["rows"] == 1 and generated.metrics["exact_match"] == 0.0
    assert [*generated.rows[0]] == ["completion", "prompt", "predicted_completion", "finish_reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft-nothing"], "no run or base 'sft-nothing'"),
        (["tiny", "--choices", "a"], "one label only, 'a'"),
        (["tiny", "--template", "none"], "none"),
    ],
)
def test_mistakes_of_the_command_line(
    arguments: list[str],
    message: str,
    tickets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llm-align", "generate", arguments[0], str(tickets), *arguments[1:]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"tickets.csv", ".tickets.tiny.jsonl.partial"}


def test_the_command_line_uses_the_labels_of_the_run(
    classifier: Result,
    tickets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["llm-align", "generate", str(classifier.directory), "tickets.csv", "--limit", "4", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["out"] == "tickets.run.jsonl" and found["rows"] == 4 and len(found["classes"]) == 3
    assert printed.err.startswith("choices  3: ") and "4 of 4 rows, " in printed.err
    assert len(rows_of(tmp_path / "tickets.run.jsonl")) == 4
    words.append("--no-choices")
    monkeypatch.setattr(sys, "argv", [*words, "--out", "text.jsonl", "--max-new-tokens", "2"])
    main()
    assert {"predicted_label", "completion"} & {*rows_of(tmp_path / "text.jsonl")[0]} == {"completion"}


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (ROWS, {"data.held_out": 0}, "true, without held-out rows"),
        ([{**row, "label": "one"} for row in ROWS], {}, "1 different replies in the training rows"),
    ],
)
def test_rows_without_labels_are_refused(
    base_folder: Path, tmp_path: Path, data: list[dict[str, str]], settings: dict[str, Any], message: str
) -> None:
    recipe = load_recipe(
        "classify", base=str(base_folder), data=data, out=tmp_path / "run", settings={**FAST, **settings}
    )
    with pytest.raises(UserError, match=message):
        run(recipe)
    assert not (tmp_path / "run").exists()
