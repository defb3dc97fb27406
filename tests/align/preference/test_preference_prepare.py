"""Held-out prompts, mixtures, labels from pairs, and the cache."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from small_preferences import pair, prepared

from align.preference.settings import PREFERENCE_SELECT, PROMPT_LENGTH, PreferenceSettings


def rows(count, prompts=None, name="q"):
    return [pair(f"{name} {i % (prompts or count)}", f"good {i}", f"bad {i}") for i in range(count)]


def prompts_of(groups):
    return {tuple(groups[index].prompt_ids.tolist()) for index in range(len(groups))}


def test_a_mixture_is_held_out_by_prompt_in_all_of_its_sources():
    first = [pair(f"q{index % 10}", chosen=f"a{index}") for index in range(20)]
    second = [pair(f"q{index % 15}", chosen=f"b{index}") for index in range(30)]
    data = prepared(None, mix=[{"source": first}, {"source": second}], held_out=6)
    prompts = [{tuple(group.prompt_ids) for group in split} for split in (data.train, data.held_out)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert "with a prompt that is in the training data" not in " ".join(data.report.counts)
    [note] = [note for note in data.report.notes if "held out" in note]
    assert note.endswith("more rows are held out: other rows of their prompts are")


@pytest.mark.parametrize("held_out", [6, 0.2])
def test_held_out_rows_are_split_by_prompt(held_out):
    data = prepared(rows(30, prompts=10), held_out=held_out)
    assert len(data.train) == 24 and len(data.held_out) == data.report.held_out == 6
    assert prompts_of(data.train) & prompts_of(data.held_out) == set()
    assert len(prompts_of(data.held_out)) == 2
    assert {prompt.location for prompt in data.prompts} == set(data.held_out.locations)
    again = prepared(rows(30, prompts=10), held_out=held_out)
    assert again.held_out.locations == data.held_out.locations
    assert (
        prepared(rows(30, prompts=10), held_out=held_out, seed=1).held_out.locations
        != data.held_out.locations
    )


def test_held_out_file_overlap_is_reported(tmp_path):
    path = tmp_path / "apart.jsonl"
    same, other = rows(1)[0], pair("q 1", "other", "bad")
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in (same, other, pair("new"), pair("x", "a", "a")))
    )
    data = prepared(rows(4), held_out=str(path))
    assert data.held_out.locations == tuple(f"{path}:{line}" for line in (1, 2, 3))
    assert data.report.counts == {
        "held out: dropped: identical chosen and rejected": 1,
        "held out: identical to a training row": 1,
        "held out: with a prompt that is in the training data": 2,
    }


def test_pairs_serve_as_labels():
    data = prepared(rows(3), kind="labels")
    assert data.train.num_completions.tolist() == [1] * 6
    assert data.train.scores.tolist() == [1.0, 0.0] * 3 and np.isnan(data.train.margins).all()
    assert data.train.locations == ["row 1", "row 1", "row 2", "row 2", "row 3", "row 3"]
    assert "pairs of data.source split into labels" in data.report.notes[0]
    assert "3 good, 3 bad" in data.report.lines()[2]


def test_mixture_of_layouts_keeps_source_indices(tmp_path):
    pairs, lists = tmp_path / "pairs.jsonl", tmp_path / "lists.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    ranked = [{"prompt": f"l {i}", "responses": ["a", "b", "c"], "scores": [1, 2, 3]} for i in range(4)]
    lists.write_text("".join(json.dumps(row) + "\n" for row in ranked))
    data = prepared(None, mix=[{"source": str(pairs), "weight": 1.0}, {"source": str(lists), "weight": 1.0}])
    assert sorted(data.train.source_ids) == [0] * 4 + [1] * 4
    assert all(len(data.train[i].completion_ids) == 2 + data.train[i].source for i in range(8))
    assert data.report.layout == "prompt/chosen/rejected + prompt/responses/scores"
    assert [source.rows for source in data.report.sources] == [4, 4]
    assert sum(source.trained_tokens for source in data.report.sources) == data.report.trained_tokens


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"source": "owner/name", "select": {"rows": 1}}, "data.select"),
        ({"mix": [{"source": "a/b"}, {"source": "a/c", "select": {"rows": 3}}]}, "data.mix[1].select"),
    ],
)
def test_selection_is_refused(data, where):
    settings = SimpleNamespace(data=PreferenceSettings(template="hh", **data))
    [problem] = PREFERENCE_SELECT.find(settings)
    assert problem.where == where and problem.actual == "selects conversations"


def test_a_given_length_leaves_tokens_for_completions():
    [problem] = prompt_length_problems(64)
    assert problem.actual == "64, but prompt and completion together have 64 tokens"
    assert not prompt_length_problems(63)


def prompt_length_problems(max_prompt_length):
    data = PreferenceSettings(source="a/b", max_length=64, max_prompt_length=max_prompt_length)
    return list(PROMPT_LENGTH.find(SimpleNamespace(data=data)))


def test_cache_restores_groups_and_counts():
    data = [prepared([*rows(5), pair("q", "long " * 99, "bad")], cache=True, max_length=80) for _ in range(2)]
    assert [prepared_data.report.from_cache for prepared_data in data] == [False, True]
    assert data[0].report.counts == data[1].report.counts != {}
    assert data[0].train.locations == data[1].train.locations
    for name in ("input_ids", "offsets", "prompt_index", "scores", "ranks", "margins"):
        first, second = (getattr(prepared_data.train, name) for prepared_data in data)
        assert first.dtype == second.dtype and np.array_equal(
            first, second, equal_nan=name in ("scores", "margins")
        )
    other = prepared(
        [*rows(5), pair("q", "long " * 99, "bad")], cache=True, max_length=80, max_prompt_length=9
    )
    assert not other.report.from_cache


def test_scores_are_part_of_the_cache_key():
    scored = [pair(score_chosen=score, score_rejected=0) for score in (1, 2)]
    margins = [prepared([row], cache=True).train[0].margin for row in scored]
    assert margins == [1.0, 2.0]


def test_report_has_lengths_of_best_and_others():
    report = prepared([pair("q", "much longer " * 5, "bad")] * 2).report
    assert report.lines()[0].startswith("2 rows (prompt/chosen/rejected), 0 held out; ")
    assert report.lines()[1].startswith("4 completions; mean tokens: prompt ")
    assert "rows identical to an earlier row (not dropped): 1 (first: row 2 repeats row 1)" in report.lines()


def test_contradictions_are_reported():
    report = prepared([pair(), pair("other"), pair(chosen="bad", rejected="good ")]).report
    assert report.counts == {"contradict an earlier one, kept": 1}
    assert report.examples == {"contradict an earlier one, kept": "row 3 and row 1"}
    labels = [
        {"prompt": "q", "completion": text, "label": good} for text, good in (("a", 1), ("b", 0), ("a", 0))
    ]
    assert prepared(labels, kind="labels").report.counts == {"contradict an earlier one, kept": 1}
