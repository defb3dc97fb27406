"""Published preference files in their published formats: every row is read, dropped rows are counted."""

from pathlib import Path

import pytest
from small_preferences import prepared
from small_tokenizers import tokenizer

from finetune.data.sources import read_source

ROOT = Path(__file__).parents[3]
DATA = ROOT / "../shared/data"

EMPTY, DIFFERENT = "dropped: empty completion", "dropped: chosen and rejected have different prompts"
NO_REPLY, NO_TEMPLATE = (
    "dropped: a dialogue without a final reply",
    "dropped: the template cannot render the conversation",
)
KOREAN = "korean/ko_hh_harmless_train.jsonl.gz"
BOTH = "with different prompts of chosen and rejected: the chosen one's is used for both"

FILES = [
    (
        "hh_rlhf/harmless-base/train.jsonl.gz",
        {},
        {"groups": 1515, "completions": 3030},
        {EMPTY: 1, DIFFERENT: 3, NO_TEMPLATE: 3},
    ),
    (
        "hh_rlhf/harmless-base/test.jsonl.gz",
        {},
        {"groups": 203, "completions": 406},
        {EMPTY: 2, DIFFERENT: 1},
    ),
    (
        KOREAN,
        {},
        {"groups": 132, "completions": 264},
        {DIFFERENT: 852, NO_REPLY: 211, EMPTY: 3, NO_TEMPLATE: 5},
    ),
    (
        KOREAN,
        {"on_different_prompts": "chosen"},
        {"groups": 777, "completions": 1554},
        {
            BOTH: 852,
            NO_REPLY: 211,
            EMPTY: 3,
            NO_TEMPLATE: 211,
            "dropped: identical chosen and rejected": 1,
        },
    ),
    (
        "llamafactory/dpo_en_demo.json",
        {"template": "chatml"},
        {"groups": 300, "completions": 600},
        {"identical to an earlier row (not dropped)": 5},
    ),
    (
        "llamafactory/dpo_zh_demo.json",
        {"template": "chatml"},
        {"groups": 300, "completions": 600},
        {"identical to an earlier row (not dropped)": 11},
    ),
    (
        "korean/logickor_ranked.jsonl.gz",
        {"template": "koalpaca"},
        {"groups": 32, "completions": 373},
        {"with tied completions, which share a rank": 32},
    ),
    (
        "preference/pandalm_human_pairs.json",
        {"template": "alpaca"},
        {"groups": 663, "completions": 1326},
        {
            EMPTY: 43,
            "dropped: tie": 83,
            "dropped: empty turn in the prompt": 1,
            "with a number or true/false instead of a completion's text, read as text": 6,
        },
    ),
    (
        "llamafactory/kto_en_demo.json",
        {"template": "chatml", "kind": "labels"},
        {"groups": 300, "completions": 300},
        {},
    ),
]


@pytest.mark.parametrize(("path", "settings", "sizes", "counts"), FILES)
def test_published_files(path, settings, sizes, counts):
    if not (DATA / path).is_file():
        pytest.skip("published data sets are not here")
    data = prepared(str(DATA / path), max_length=65536, **settings)
    groups = data.train
    assert {"groups": len(groups), "completions": int(groups.num_completions.sum())} == sizes
    assert {what: data.report.counts.get(what) for what in counts} == counts
    assert data.report.num_too_long == 0 and len(data.prompts) == min(64, len({*groups.locations}))


def test_hh_dialogues_match_the_file_word_by_word():
    path = DATA / "hh_rlhf/harmless-base/test.jsonl.gz"
    if not path.is_file():
        pytest.skip("published data sets are not here")
    rows = {row.location: row.columns for row in read_source(str(path))}
    data = prepared(str(path), max_length=65536)
    decode, same = tokenizer("qwen").decode, 0
    for group in (data.train[index] for index in range(len(data.train))):
        for ids, name in zip(group.completion_ids, ("chosen", "rejected"), strict=True):
            text = decode([*group.prompt_ids, *ids], skip_special_tokens=True)
            same += text.split() == rows[group.location][name].split()
    escaped = data.report.counts.get("contain template markers in their text (escaped)", 0)
    assert same == 2 * len(data.train) and escaped == 0


def test_alpaca_eval_s_ranked_lists():
    path = DATA / "preference/alpaca_eval_ranked.jsonl.gz"
    if not path.is_file():
        pytest.skip("published data sets are not here")
    data = prepared(str(path), template="alpaca", max_length=256)
    assert max(data.train.num_completions) == 10 and len(data.train) == 563
    for index in range(20):
        group = data.train[index]
        assert (group.scores[:-1] >= group.scores[1:]).all() and group.ranks[0] == 0
        assert group.margin == group.scores[0] - group.scores[-1]


@pytest.mark.parametrize(("part", "rows"), [("train", 1500), ("held_out", 150)])
def test_the_embedded_pairs_are_all_usable(part, rows):
    data = prepared(str(ROOT / f"recipes/tiny/data/preferences_{part}.jsonl"), template="alpaca")
    assert len(data.train) == rows and data.report.layout == "prompt/chosen/rejected"
    assert data.report.counts == {} and (data.train.num_completions == 2).all()
