"""A suite is asked through the cache, and scored: with a scripted model, whose answers are known."""

import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import pytest

from finetune.evaluation.answer_cache import AnswerCache
from finetune.evaluation.answers import ChoiceAnswer, CompletionAnswer, Sampling, TextAnswer, Turns
from finetune.evaluation.results import Evaluation, load_evaluation, save_evaluation
from finetune.evaluation.rows import read_items
from finetune.evaluation.run_suite import ITEMS_PER_WINDOW, run_suite
from finetune.evaluation.suites import load_suite
from finetune.recipe.errors import UserError


class ScriptedModel:
    """Answers from a table; counts what it is asked, and may be killed in the middle."""

    label = "scripted"
    identity: Mapping[str, Any] = {"model": "scripted"}

    def __init__(self, answers: Mapping[str, Any], *, die_after: int | None = None) -> None:
        self.answers, self.die_after, self.asked = answers, die_after, 0

    def _answer(self, text: str) -> Any:
        if self.asked == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked += 1
        return self.answers[text]

    def complete(self, prompts: Sequence[Turns], sampling: Sampling) -> list[CompletionAnswer]:
        return [CompletionAnswer(self._answer(turns[-1].content), True) for turns in prompts]

    def choose(self, questions: Sequence[tuple[Turns, Sequence[str]]], *, style: str) -> list[ChoiceAnswer]:
        sizes = [tuple(len(choice.encode()) for choice in choices) for _, choices in questions]
        logps = [self._answer(turns[-1].content) for turns, _ in questions]
        return [ChoiceAnswer(tuple(own), size) for own, size in zip(logps, sizes, strict=True)]

    def read(self, texts: Sequence[str]) -> list[TextAnswer]:
        return [TextAnswer(self._answer(text), 3, len(text.encode())) for text in texts]


def suite_file(folder: Path, text: str, rows: Sequence[str]) -> str:
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    path = folder / "mine.yaml"
    path.write_text(f"description: mine\ndata: {{source: rows.jsonl}}\n{text}", encoding="utf-8")
    return str(path)


def test_choices_are_scored_by_likelihood_and_by_likelihood_per_byte(tmp_path: Path) -> None:
    rows = [
        '{"question": "1", "choices": ["a", "long answer"], "answer": 0}',
        '{"question": "2", "choices": ["a", "long answer"], "answer": "B"}',
        '{"question": "3", "choices": ["a", "b"], "answer": "b"}',
    ]
    suite = load_suite(suite_file(tmp_path, "task: choice", rows))
    model = ScriptedModel({"1": [-2.0, -3.0], "2": [-2.0, -3.0], "3": [-1.0, -0.5]})
    result = run_suite(suite, read_items(suite), model, AnswerCache(model.identity, tmp_path))
    # By likelihood: right, wrong, right. Per byte, -3/11 is above -2: wrong, right, right.
    assert [item.values["score"] for item in result.items] == [1, 0, 1]
    assert [item.values["score_per_byte"] for item in result.items] == [0, 1, 1]
    name, accuracy = result.headline
    assert (name, round(accuracy.value, 6), accuracy.count) == ("accuracy", 0.666667, 3)


def test_texts_are_measured_in_bits_per_byte(tmp_path: Path) -> None:
    suite = load_suite(suite_file(tmp_path, "task: perplexity", ['{"text": "abcd"}', '{"text": "가"}']))
    # 8 bits for 4 bytes, 6 bits for the 3 bytes of a syllable.
    model = ScriptedModel({"abcd": -8 * log(2), "가": -6 * log(2)})
    result = run_suite(suite, read_items(suite), model, AnswerCache(model.identity, tmp_path))
    assert result.headline[0] == "bits per byte"
    assert result.headline[1].value == pytest.approx(14 / 7)


def test_completions_are_graded_and_a_finished_suite_asks_nothing(tmp_path: Path) -> None:
    rows = [f'{{"prompt": "{n}", "completion": "{n}!"}}' for n in range(4)]
    suite = load_suite(suite_file(tmp_path, "task: completion\ngrader: exact", rows))
    model = ScriptedModel({str(n): f"{n}!" if n else "other" for n in range(4)})
    cache = AnswerCache(model.identity, tmp_path)
    result = run_suite(suite, read_items(suite), model, cache)
    assert [item.score for item in result.items] == [0, 1, 1, 1]
    assert result.items[0].evidence["completion"] == "other"
    again = ScriptedModel({})
    repeated = run_suite(suite, read_items(suite), again, AnswerCache(model.identity, tmp_path))
    assert (again.asked, repeated.items, repeated.fingerprint) == (0, result.items, result.fingerprint)
    save_evaluation(tmp_path / "eval", Evaluation("m", model.identity, {"mine": result}))
    assert load_evaluation(tmp_path / "eval").suites["mine"] == result


def test_a_killed_evaluation_keeps_its_answers(tmp_path: Path) -> None:
    count = 3 * ITEMS_PER_WINDOW
    rows = [f'{{"prompt": "{n}", "completion": "{n}"}}' for n in range(count)]
    path = suite_file(tmp_path, "task: completion\ngrader: exact", rows)
    answers = {str(n): str(n) for n in range(count)}

    def run() -> None:
        model = ScriptedModel(answers, die_after=2 * ITEMS_PER_WINDOW + 5)
        suite = load_suite(path)
        run_suite(suite, read_items(suite), model, AnswerCache(model.identity, tmp_path))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    model, suite = ScriptedModel(answers), load_suite(path)
    result = run_suite(suite, read_items(suite), model, AnswerCache(model.identity, tmp_path))
    assert model.asked == ITEMS_PER_WINDOW
    assert result.headline[1].value == 1


def test_answers_belong_to_model_and_sampling(tmp_path: Path) -> None:
    rows = ['{"prompt": "1", "completion": "1"}']
    path = suite_file(tmp_path, "task: completion\ngrader: exact", rows)
    for identity, settings, asked in (
        ({"model": "a"}, {}, 1),
        ({"model": "a"}, {}, 0),
        ({"model": "b"}, {}, 1),
        ({"model": "a"}, {"max_new_tokens": 7}, 1),
        ({"model": "a"}, {"temperature": 0.5}, 1),
        ({"model": "a"}, {"temperature": 0.5, "seed": 1}, 1),
        ({"model": "a"}, {"description": "another text"}, 0),
    ):
        suite = load_suite(path)
        suite = type(suite)(suite.name, suite.path, suite.settings.model_copy(update=settings))
        model = ScriptedModel({"1": "1"})
        run_suite(suite, read_items(suite), model, AnswerCache(identity, tmp_path))
        assert model.asked == asked, (identity, settings)


BAD_SUITES = {
    "task: choices": "did you mean 'choice'?",
    "task: completion": "a completion task without a grader",
    "task: choice\ngraders: exact": "mine.yaml.graders: unknown key",
    "task: choice\nlimit: 0": "mine.yaml.limit: found 0",
    "task: choice": "field 'choices': found None",
    "task: completion\ngrader: exakt": "exakt",
    "task: completion\ngrader: exact\nprompt: '{quest}'": "no column 'quest'",
}


@pytest.mark.parametrize("text", BAD_SUITES)
def test_bad_suites(text: str, tmp_path: Path) -> None:
    path = suite_file(tmp_path, text, ['{"prompt": "1", "completion": "1"}'])
    with pytest.raises(UserError) as caught:
        suite = load_suite(path)
        run_suite(suite, read_items(suite), ScriptedModel({"1": "1"}), AnswerCache({}, tmp_path))
    assert BAD_SUITES[text] in str(caught.value)


def test_unknown_suites() -> None:
    with pytest.raises(UserError, match="unknown suite 'truthful'"):
        load_suite("truthful")
    with pytest.raises(UserError, match="no such file"):
        load_suite("./nowhere.yaml")


def test_a_limit_draws_the_same_items_each_time_and_whole_clusters(tmp_path: Path) -> None:
    rows = [f'{{"prompt": "{n}", "completion": "x"}}' for n in range(50)]
    suite = load_suite(suite_file(tmp_path, "task: completion\ngrader: exact\nlimit: 10", rows))
    first, second = read_items(suite), read_items(suite)
    assert first == second and len(first) == 10
    assert [item.id for item in first] != [f"rows.jsonl:{n}" for n in range(1, 11)]


def test_a_damaged_cache_names_its_file(tmp_path: Path) -> None:
    cache = AnswerCache({}, tmp_path)
    cache.store.path.write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="delete this file"):
        cache.answers(["q"], lambda indices: ["a"], window=1)
