"""Held-out prompts, mixtures, labels from pairs, and the cache."""

import json

import numpy as np
import pytest
from small_preferences import pair, prepared

from finetune.recipe.errors import UserError


def rows(count, prompts=None, name="q"):
    return [pair(f"{name} {i % (prompts or count)}", f"good {i}", f"bad {i}") for i in range(count)]


def prompts_of(groups):
    return {tuple(groups[index].prompt_ids.tolist()) for index in range(len(groups))}


@pytest.mark.parametrize("held_out", [6, 0.2])
def test_whole_prompts_are_held_out(held_out):
    data = prepared(rows(30, prompts=10), held_out=held_out)
    assert len(data.train) == 24 and len(data.held_out) == data.report.held_out == 6
    assert prompts_of(data.train) & prompts_of(data.held_out) == set()
    assert len(prompts_of(data.held_out)) == 2
    assert {prompt.where for prompt in data.prompts} == set(data.held_out.places)
    again = prepared(rows(30, prompts=10), held_out=held_out)
    assert again.held_out.places == data.held_out.places
    assert prepared(rows(30, prompts=10), held_out=held_out, seed=1).held_out.places != data.held_out.places


def test_a_held_out_file_is_told_where_it_repeats_what_is_learnt(tmp_path):
    path = tmp_path / "apart.jsonl"
    same, other = rows(1)[0], pair("q 1", "other", "bad")
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in (same, other, pair("new"), pair("x", "a", "a")))
    )
    data = prepared(rows(4), held_out=str(path))
    assert data.held_out.places == tuple(f"{path}:{line}" for line in (1, 2, 3))
    assert data.report.counts == {
        "held out: dropped: identical chosen and rejected": 1,
        "held out: identical to a training row": 1,
        "held out: with a prompt that is in the training data": 2,
    }


def test_pairs_serve_as_labels():
    data = prepared(rows(3), kind="labels")
    assert data.train.completions.tolist() == [1] * 6
    assert data.train.scores.tolist() == [1.0, 0.0] * 3 and np.isnan(data.train.margins).all()
    assert data.train.places == ("row 1", "row 1", "row 2", "row 2", "row 3", "row 3")
    assert "pairs of data.source split into labels" in data.report.notes[0]
    assert "3 good, 3 bad" in data.report.lines()[2]


def test_a_mixture_of_layouts_keeps_its_sources_apart(tmp_path):
    pairs, lists = tmp_path / "pairs.jsonl", tmp_path / "lists.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    ranked = [{"prompt": f"l {i}", "responses": ["a", "b", "c"], "scores": [1, 2, 3]} for i in range(4)]
    lists.write_text("".join(json.dumps(row) + "\n" for row in ranked))
    data = prepared(None, mix=[{"source": str(pairs), "weight": 1.0}, {"source": str(lists), "weight": 1.0}])
    assert sorted(data.train.sources) == [0] * 4 + [1] * 4
    assert all(len(data.train[i].completion_ids) == 2 + data.train[i].source for i in range(8))
    assert data.report.layout == "prompt/chosen/rejected + prompt/responses/scores"
    assert [source.rows for source in data.report.sources] == [4, 4]
    assert sum(source.trained_tokens for source in data.report.sources) == data.report.trained_tokens


def test_a_mixed_source_cannot_be_selected_from():
    mix = [{"source": "owner/name"}, {"source": "owner/other", "select": {"rows": 3}}]
    with pytest.raises(UserError, match=r"data\.mix\[1\]\.select: selects conversations"):
        prepared(None, mix=mix)


def test_the_cache_gives_back_groups_and_counts():
    data = [prepared([*rows(5), pair("q", "long " * 99, "bad")], cache=True, max_length=80) for _ in range(2)]
    assert [one.report.from_cache for one in data] == [False, True]
    assert data[0].report.counts == data[1].report.counts != {}
    assert data[0].train.places == data[1].train.places
    for name in ("input_ids", "starts", "firsts", "scores", "ranks", "margins"):
        first, second = (getattr(one.train, name) for one in data)
        assert first.dtype == second.dtype and np.array_equal(
            first, second, equal_nan=name in ("scores", "margins")
        )
    other = prepared(
        [*rows(5), pair("q", "long " * 99, "bad")], cache=True, max_length=80, max_prompt_length=9
    )
    assert not other.report.from_cache


def test_judgement_decides_what_the_cache_holds():
    scored = [pair(score_chosen=score, score_rejected=0) for score in (1, 2)]
    margins = [prepared([row], cache=True).train[0].margin for row in scored]
    assert margins == [1.0, 2.0]


def test_the_report_tells_lengths_of_the_better_and_the_worse():
    report = prepared([pair("q", "much longer " * 5, "bad")] * 2).report
    assert report.lines()[0].startswith("2 rows (prompt/chosen/rejected), 0 held out; ")
    assert report.lines()[1].startswith("4 completions; mean tokens: prompt ")
    assert "rows identical to an earlier row (not dropped): 1 (first: row 2 repeats row 1)" in report.lines()


def test_contradictions_are_told():
    report = prepared([pair(), pair("other"), pair(chosen="bad", rejected="good ")]).report
    assert report.counts == {"contradict an earlier one, kept": 1}
    assert report.examples == {"contradict an earlier one, kept": "row 3 and row 1"}
    labels = [
        {"prompt": "q", "completion": text, "label": good} for text, good in (("a", 1), ("b", 0), ("a", 0))
    ]
    assert prepared(labels, kind="labels").report.counts == {"contradict an earlier one, kept": 1}
