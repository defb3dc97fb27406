"""Generation evals: graders, and exact match on a retention set, before and after training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fixture_types import Tune

from data_templates.segments import Message
from finetune.data.conversation import Conversation
from finetune.recipe.errors import UserError
from finetune.recipe.user_arguments import RowFunction, load_graders
from finetune.training.generation import Completion
from finetune.training.generation_eval import GenerationEval, Graders, mean_grade

GRADER = """
def longer(prompt, completion):
    return None if "no" in prompt else len(completion) > 2

def loud(completion):
    return completion.count("!")

def broken(prompt, completion):
    raise KeyError("score")

def alone(prompt):
    return True
"""


@pytest.fixture
def grader(tmp_path: Path) -> str:
    path = tmp_path / "judge.py"
    path.write_text(GRADER, encoding="utf-8")
    return str(path)


def conversation(question: str, answer: str) -> Conversation:
    return Conversation([Message("user", question), Message("assistant", answer)], "rows.jsonl:1")


class Record:
    """A stub of a run directory that only has a record."""

    is_writer = False

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"metrics": {}}

    def update(self, *, metrics: dict[str, float], cases: dict[str, int]) -> None:
        self.record["metrics"] |= metrics
        self.record["cases"] = cases


def echo(prompts: Sequence[Sequence[Message]]) -> list[Completion]:
    return [Completion(prompt[-1].content, True) for prompt in prompts]


def test_a_grader_may_skip_prompts(grader: str) -> None:
    graders = Graders(load_graders({"longer": f"{grader}:longer"}))
    pairs = [("yes", "abc"), ("yes", "a"), ("no", "abc"), ("yes", "abcd")]
    rows = [graders.row([Message("user", prompt)], text, "rows.jsonl:1", None) for prompt, text in pairs]
    grades = graders.grade(rows)["longer"]
    assert grades == [1, 0, None, 1] and mean_grade("longer", grades) == 2 / 3


def test_graders_and_retention_before_and_after(grader: str) -> None:
    graders = load_graders({"longer": f"{grader}:longer", "loud": f"{grader}:loud"})
    generation_eval = GenerationEval(
        Graders(graders),
        [conversation("ab", "?"), conversation("abc!!", "?")],
        [conversation("7", "7"), conversation("8", "9")],
    )
    run = Record()
    generation_eval.evaluate(run, echo, "before")  # type: ignore[arg-type]
    assert run.record["metrics"] == {
        "eval/graders/longer_before": 0.5,
        "eval/graders/loud_before": 1.0,
        "eval/retention_before": 0.5,
    }
    generation_eval.evaluate(run, lambda prompts: [Completion("9!", True)] * len(prompts), "after")  # type: ignore[arg-type]
    assert run.record["metrics"]["eval/graders/loud_after"] == 1.0
    assert run.record["metrics"]["eval/retention_after"] == 0.0


def test_a_resumed_run_keeps_its_before_metrics(grader: str) -> None:
    run = Record()
    run.record["metrics"] = {"eval/graders/loud_before": 0.25}
    generation_eval = GenerationEval(
        Graders(load_graders({"loud": f"{grader}:loud"})), [conversation("a", "b")], []
    )
    generation_eval.evaluate(run, echo, "before")  # type: ignore[arg-type]
    assert run.record["metrics"] == {"eval/graders/loud_before": 0.25}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("high", "it returned 'high'; prompt 'q', completion 'r'"),
        (float("nan"), "it returned nan"),
        (None, "None for each of 1 prompts"),
        (None, "repair:   it grades other data: evaluate.graders={}"),
    ],
)
def test_a_grader_without_a_number_is_named(value: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        graders = Graders({"tone": RowFunction(lambda prompt, completion: value)})
        mean_grade("tone", graders.grade([graders.row([Message("user", "q")], "r", "", None)])["tone"])
    assert "evaluate.graders.tone" in str(error.value) and message in str(error.value)


def test_all_invalid_graders_are_reported(grader: str) -> None:
    with pytest.raises(UserError) as error:
        load_graders({"one": f"{grader}:nobody", "two": f"{grader}:alone"})
    assert [problem.where for problem in error.value.problems] == [
        "evaluate.graders.one",
        "evaluate.graders.two",
    ]
    assert "takes no `completion`" in str(error.value)


def test_a_run_records_grades_and_retention(tune: Tune, grader: str, tmp_path: Path) -> None:
    retention = tmp_path / "skill.jsonl"
    rows = [{"instruction": f"{i} + 1", "output": str(i + 1)} for i in range(9)]
    retention.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = tune(
        evaluate__graders={"longer": f"{grader}:longer"},
        evaluate__retention=str(retention),
        evaluate__retention_rows=4,
    )
    metrics = result.record["metrics"]
    assert 0 <= metrics["eval/graders/longer_before"] <= 1 and 0 <= metrics["eval/graders/longer_after"] <= 1
    assert (
        metrics["eval/retention_before"] in (0, 0.25, 0.5, 0.75, 1) and metrics["eval/retention_after"] <= 1
    )
    assert {"grader: longer", "retention: exact match"} <= result.record["summary"].keys()


def test_a_grader_that_raises_stops_the_run(tune: Tune, grader: str) -> None:
    with pytest.raises(UserError, match=r"evaluate.graders.tone: KeyError: 'score' \(.*judge.py:9\); prompt"):
        tune(evaluate__graders={"tone": f"{grader}:broken"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluate__graders": {"a": "nowhere.py:f"}}, "evaluate.graders.a"),
        ({"evaluate__graders": {"a b": "finetune/graders/stories.py:happy_end"}}, "letters, digits and _"),
        ({"evaluate__retention": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        (
            {"evaluate__graders": {"a": "finetune/graders/stories.py:happy_end"}, "data__held_out": 0},
            "evaluate.graders (command line): set, but data.held_out is 0",
        ),
    ],
)
def test_eval_errors_are_raised_before_loading(
    tune: Tune, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        tune("run", **settings)
    assert message in str(error.value) and not (tmp_path / "run").exists()
