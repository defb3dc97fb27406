"""samples.jsonl: completions before and after training, and their scores."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from fixture_types import MakeRecipe, Tune

from data_templates.segments import Message
from finetune.training.generation import Completion
from finetune.training.run_directory import RunDirectory
from finetune.training.samples import Samples, evenly_spaced, sample_turns


@pytest.fixture
def run(make_recipe: MakeRecipe, tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, make_recipe(), "12345678")


def conversation(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


class ScriptedModel:
    """Returns completions from a list and records the prompts."""

    def __init__(self, *texts: str, ended_with_eos: Sequence[bool] | None = None) -> None:
        self.completions = [
            Completion(text, stop) for text, stop in zip(texts, ended_with_eos or [True] * 9, strict=False)
        ]
        self.prompts: list[list[Message]] = []

    def __call__(self, prompts: Sequence[Sequence[Message]]) -> list[Completion]:
        self.prompts = [list(prompt) for prompt in prompts]
        return self.completions


CONVERSATIONS = [conversation("2 + 2", "4"), conversation("3 + 3", "6"), conversation("4 + 4", "8")]
PLACES = ["a.jsonl:1", "a.jsonl:5", "b.jsonl:2"]


def test_all_are_scored_and_the_first_are_written(run: RunDirectory) -> None:
    samples = Samples(CONVERSATIONS, num_shown=2, scored=True, locations=PLACES)
    samples.record_before(run, ScriptedModel("5", "6", "?", ended_with_eos=[False, False, True]))
    samples.record_after(run, ScriptedModel("4", "6", "7", ended_with_eos=[True, True, False]))
    assert run.samples() == [
        {"prompt": "2 + 2", "expected": "4", "before": "5", "after": "4", "ended_with_eos": True},
        {"prompt": "3 + 3", "expected": "6", "before": "6", "after": "6", "ended_with_eos": True},
    ]
    scores = run.record["metrics"]
    assert scores["eval/exact_match_before"] == pytest.approx(1 / 3)
    assert scores["eval/exact_match_after"] == pytest.approx(2 / 3)
    assert scores["samples/eos_rate_before"] == pytest.approx(1 / 3)
    assert scores["samples/eos_rate_after"] == pytest.approx(2 / 3)


def test_unscored_samples_have_no_exact_match(run: RunDirectory) -> None:
    Samples(CONVERSATIONS, num_shown=3, scored=False, locations=PLACES).record_before(
        run, ScriptedModel("a", "b", "c")
    )
    assert set(run.record["metrics"]) == {"samples/eos_rate_before"}


def test_the_prompt_is_everything_before_the_last_reply(run: RunDirectory) -> None:
    turns = [Message("system", "Be brief."), *conversation("a", "b"), Message("user", "c", context="d")]
    script = ScriptedModel("e")
    Samples([[*turns, Message("assistant", "f")]], num_shown=1, scored=False, locations=PLACES).record_before(
        run, script
    )
    assert script.prompts == [turns]
    [line] = run.samples()
    assert sample_turns(line) == turns
    entry = [[turn.role, turn.content, turn.context] for turn in turns]
    assert line == {"prompt": "Be brief.\na\nb\nc\nd", "expected": "f", "before": "e", "turns": entry}
    assert sample_turns({"prompt": "a\nb"}) == [Message("user", "a\nb")]


def test_a_resumed_run_keeps_its_before_completions(run: RunDirectory) -> None:
    samples = Samples(CONVERSATIONS, num_shown=1, scored=False, locations=PLACES)
    samples.record_before(run, ScriptedModel("first", "x", "y"))
    second = ScriptedModel("second", "x", "y")
    samples.record_before(run, second)
    assert second.prompts == [] and run.samples()[0]["before"] == "first"


def test_no_questions_no_file(run: RunDirectory) -> None:
    script = ScriptedModel()
    samples = Samples([], num_shown=0, scored=False, locations=PLACES)
    samples.record_before(run, script)
    samples.record_after(run, script)
    assert run.samples() == [] and not (run.path / "samples.jsonl").exists() and script.prompts == []


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\x0bb\x1cc", 'a\n"b"\r\n', "한국어 \u2029"])
def test_any_completion_round_trips(run: RunDirectory, text: str) -> None:
    samples = Samples(CONVERSATIONS[:1], num_shown=1, scored=False, locations=PLACES)
    samples.record_before(run, ScriptedModel(text))
    samples.record_after(run, ScriptedModel(text))
    [entry] = run.samples()
    assert entry["before"] == entry["after"] == text
    raw = (run.path / "samples.jsonl").read_bytes()
    assert raw.count(b"\n") == 1 and json.loads(raw)["expected"] == "4"


def test_exact_match_uses_the_template_s_rendering(tune: Tune) -> None:
    rows = [{"question": f"{i} + 1", "answer": f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(12)]
    result = tune("run", data__source=rows, data__template="cot", train__max_steps=1)
    assert all(re.fullmatch(r"(\d+)\nThe answer is \1\.", entry["expected"]) for entry in result.samples)
    assert len(result.samples) == 2


def test_a_final_tool_call_is_generated(tune: Tune) -> None:
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    row = {"conversations": [{"from": "human", "value": "Add."}, call]}
    result = tune("run", data__source=[row] * 12, data__template="toolcall", train__max_steps=1)
    expected = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert {entry["expected"] for entry in result.samples} == {expected}


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(216, 4, [0, 72, 143, 215]), (3, 5, [0, 1, 2]), (9, 1, [0]), (9, 0, []), (5, 5, [0, 1, 2, 3, 4])],
)
def test_samples_are_evenly_spaced(total: int, count: int, expected: list[int]) -> None:
    assert evenly_spaced(total, count) == expected
