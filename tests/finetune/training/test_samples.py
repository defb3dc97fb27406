"""samples.jsonl: completions before and after training, and their scores."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from fixture_types import MakeRecipe, Tune

from data_templates._segments import Message
from finetune.training.generate import Reply
from finetune.training.run_directory import RunDirectory
from finetune.training.samples import Samples, spread, turns_of


@pytest.fixture
def run(make_recipe: MakeRecipe, tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, make_recipe(), "12345678")


def talk(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


class Scripted:
    """Returns completions from a list and records the prompts."""

    def __init__(self, *texts: str, stopped: Sequence[bool] | None = None) -> None:
        self.replies = [Reply(text, stop) for text, stop in zip(texts, stopped or [True] * 9, strict=False)]
        self.asked: list[list[Message]] = []

    def __call__(self, prompts: Sequence[Sequence[Message]]) -> list[Reply]:
        self.asked = [list(prompt) for prompt in prompts]
        return self.replies


CONVERSATIONS = [talk("2 + 2", "4"), talk("3 + 3", "6"), talk("4 + 4", "8")]


def test_all_are_scored_and_the_first_are_kept(run: RunDirectory) -> None:
    samples = Samples(CONVERSATIONS, shown=2, scored=True)
    samples.before(run, Scripted("5", "6", "?", stopped=[False, False, True]))
    samples.after(run, Scripted("4", "6", "7", stopped=[True, True, False]))
    assert run.samples() == [
        {"prompt": "2 + 2", "expected": "4", "before": "5", "after": "4", "stopped": True},
        {"prompt": "3 + 3", "expected": "6", "before": "6", "after": "6", "stopped": True},
    ]
    scores = run.record["metrics"]
    assert scores["exact_match_before"] == pytest.approx(1 / 3)
    assert scores["exact_match_after"] == pytest.approx(2 / 3)
    assert scores["stopped_before"] == pytest.approx(1 / 3)
    assert scores["stopped_after"] == pytest.approx(2 / 3)


def test_unscored_samples_have_no_exact_match(run: RunDirectory) -> None:
    Samples(CONVERSATIONS, shown=3, scored=False).before(run, Scripted("a", "b", "c"))
    assert set(run.record["metrics"]) == {"stopped_before"}


def test_the_last_reply_is_asked_for_with_everything_before_it(run: RunDirectory) -> None:
    turns = [Message("system", "Be brief."), *talk("a", "b"), Message("user", "c", context="d")]
    script = Scripted("e")
    Samples([[*turns, Message("assistant", "f")]], shown=1, scored=False).before(run, script)
    assert script.asked == [turns]
    [line] = run.samples()
    assert turns_of(line) == turns
    said = [[turn.role, turn.content, turn.context] for turn in turns]
    assert line == {"prompt": "Be brief.\na\nb\nc\nd", "expected": "f", "before": "e", "turns": said}
    assert turns_of({"prompt": "a\nb"}) == [Message("user", "a\nb")]


def test_a_resumed_run_keeps_what_its_first_start_wrote(run: RunDirectory) -> None:
    samples = Samples(CONVERSATIONS, shown=1, scored=False)
    samples.before(run, Scripted("first", "x", "y"))
    second = Scripted("second", "x", "y")
    samples.before(run, second)
    assert second.asked == [] and run.samples()[0]["before"] == "first"


def test_no_questions_no_file(run: RunDirectory) -> None:
    script = Scripted()
    samples = Samples([], shown=0, scored=False)
    samples.before(run, script)
    samples.after(run, script)
    assert run.samples() == [] and not (run.path / "samples.jsonl").exists() and script.asked == []


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\x0bb\x1cc", 'a\n"b"\r\n', "한국어 \u2029"])
def test_any_reply_comes_back_as_it_was(run: RunDirectory, text: str) -> None:
    samples = Samples(CONVERSATIONS[:1], shown=1, scored=False)
    samples.before(run, Scripted(text))
    samples.after(run, Scripted(text))
    [line] = run.samples()
    assert line["before"] == line["after"] == text
    raw = (run.path / "samples.jsonl").read_bytes()
    assert raw.count(b"\n") == 1 and json.loads(raw)["expected"] == "4"


def test_a_reply_is_compared_with_the_words_of_the_template(tune: Tune) -> None:
    rows = [{"question": f"{i} + 1", "answer": f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(12)]
    result = tune("run", data__source=rows, data__template="cot", train__max_steps=1)
    assert all(re.fullmatch(r"(\d+)\nThe answer is \1\.", line["expected"]) for line in result.samples)
    assert len(result.samples) == 2


def test_a_conversation_that_ends_in_a_call_is_asked_for_the_call(tune: Tune) -> None:
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    row = {"conversations": [{"from": "human", "value": "Add."}, call]}
    result = tune("run", data__source=[row] * 12, data__template="toolcall", train__max_steps=1)
    expected = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert {line["expected"] for line in result.samples} == {expected}


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(216, 4, [0, 72, 143, 215]), (3, 5, [0, 1, 2]), (9, 1, [0]), (9, 0, []), (5, 5, [0, 1, 2, 3, 4])],
)
def test_samples_are_spread_over_the_rows(total: int, count: int, expected: list[int]) -> None:
    assert spread(total, count) == expected
