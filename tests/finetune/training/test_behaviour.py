"""Generation evals: graders, and exact match on a retention set, before and after training."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fixture_types import Tune

from data_templates._segments import Message
from finetune.recipe.errors import UserError
from finetune.training.behaviour import Behaviour, load_judges, mean_judgement
from finetune.training.generate import Reply

JUDGE = """
def longer(prompt, reply):
    return None if "no" in prompt else len(reply) > 2

def loud(prompt, reply):
    return reply.count("!")

def broken(prompt, reply):
    raise KeyError("score")

def alone(prompt):
    return True
"""


@pytest.fixture
def judge(tmp_path: Path) -> str:
    path = tmp_path / "judge.py"
    path.write_text(JUDGE, encoding="utf-8")
    return str(path)


def talk(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


class Record:
    """A stub of a run directory that only has a record."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"metrics": {}}

    def update(self, *, metrics: dict[str, float]) -> None:
        self.record["metrics"] |= metrics


def echo(prompts: Sequence[Sequence[Message]]) -> list[Reply]:
    return [Reply(prompt[-1].content, True) for prompt in prompts]


def test_a_judge_speaks_of_the_replies_that_it_knows_about(judge: str) -> None:
    judges = load_judges({"longer": f"{judge}:longer"})
    prompts = ["yes", "yes", "no", "yes"]
    assert mean_judgement("longer", judges["longer"], prompts, ["abc", "a", "abc", "abcd"]) == 2 / 3


def test_judges_and_skill_are_measured_before_and_after(judge: str) -> None:
    judges = load_judges({"longer": f"{judge}:longer", "loud": f"{judge}:loud"})
    behaviour = Behaviour(judges, [talk("ab", "?"), talk("abc!!", "?")], [talk("7", "7"), talk("8", "9")])
    run = Record()
    behaviour.measure(run, echo, "before")  # type: ignore[arg-type]
    assert run.record["metrics"] == {
        "judged_longer_before": 0.5,
        "judged_loud_before": 1.0,
        "skill_before": 0.5,
    }
    behaviour.measure(run, lambda prompts: [Reply("9!", True)] * len(prompts), "after")  # type: ignore[arg-type]
    assert run.record["metrics"]["judged_loud_after"] == 1.0
    assert run.record["metrics"]["skill_after"] == 0.0


def test_a_resumed_run_keeps_what_was_measured_before(judge: str) -> None:
    run = Record()
    run.record["metrics"] = {"judged_loud_before": 0.25}
    behaviour = Behaviour(load_judges({"loud": f"{judge}:loud"}), [talk("a", "b")], [])
    behaviour.measure(run, echo, "before")  # type: ignore[arg-type]
    assert run.record["metrics"] == {"judged_loud_before": 0.25}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("high", "it returned 'high'; prompt 'q', reply 'r'"),
        (float("nan"), "it returned nan"),
        (None, "None for each of 1 prompts"),
    ],
)
def test_what_is_no_judgement_names_the_judge(value: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        mean_judgement("tone", lambda prompt, reply: value, ["q"], ["r"])  # type: ignore[arg-type,return-value]
    assert "evaluate.judges.tone" in str(caught.value) and message in str(caught.value)


def test_every_judge_that_cannot_serve_is_told(judge: str) -> None:
    with pytest.raises(UserError) as caught:
        load_judges({"one": f"{judge}:nobody", "two": f"{judge}:alone"})
    assert [problem.where for problem in caught.value.problems] == [
        "evaluate.judges.one",
        "evaluate.judges.two",
    ]
    assert "takes (prompt, reply)" in str(caught.value)


def test_a_run_tells_what_was_judged_and_what_was_kept(tune: Tune, judge: str, tmp_path: Path) -> None:
    skill = tmp_path / "skill.jsonl"
    rows = [{"instruction": f"{i} + 1", "output": str(i + 1)} for i in range(9)]
    skill.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = tune(
        evaluate__judges={"longer": f"{judge}:longer"}, evaluate__skill=str(skill), evaluate__skill_rows=4
    )
    metrics = SimpleNamespace(**result.record["metrics"])
    assert 0 <= metrics.judged_longer_before <= 1 and 0 <= metrics.judged_longer_after <= 1
    assert metrics.skill_before in (0, 0.25, 0.5, 0.75, 1) and metrics.skill_after <= 1
    assert {"grader: longer", "retention: exact match"} <= result.record["headline"].keys()


def test_a_judge_that_raises_stops_the_run(tune: Tune, judge: str) -> None:
    with pytest.raises(UserError, match=r"evaluate.judges.tone: KeyError: 'score'; prompt"):
        tune(evaluate__judges={"tone": f"{judge}:broken"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluate__judges": {"a": "nowhere.py:f"}}, "evaluate.judges.a"),
        ({"evaluate__judges": {"a b": "finetune/tiny/judges.py:happy_end"}}, "letters, digits and _"),
        ({"evaluate__skill": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        (
            {"evaluate__judges": {"a": "finetune/tiny/judges.py:happy_end"}, "data__held_out": 0},
            "evaluate.judges (command line): set, but data.held_out is 0",
        ),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_loaded(
    tune: Tune, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        tune("run", **settings)
    assert message in str(caught.value) and not (tmp_path / "run").exists()
