"""Prompt and completion are the encoder's tokens, EOS is trained, and truncation is reported."""

import numpy as np
import pytest
from small_preferences import pair, prepared
from small_tokenizers import MAKERS, tokenizer

from align.preference.rows.encode import LengthLimits, truncate_to
from data_templates.segments import Message
from finetune.data.tokens import Encoder

TEMPLATES = [
    "alpaca",
    "chatml",
    "cot",
    "exaone",
    "flan",
    "gemma",
    "hh",
    "koalpaca",
    "kullm",
    "llama2",
    "llama3",
] + ["mistral", "mistral_v1", "plain", "qwen", "toolcall", "vicuna", "zephyr"]
ONE_EXCHANGE = ("alpaca", "cot", "flan", "koalpaca", "kullm", "plain")
ROWS = [
    pair("What is it?", "It is a question.", "No."),
    pair("Add 2 and 3.\n", " The sum is 5.\n", "It is <|im_end|> </s> 6 <s>"),
    pair("더하면 얼마인가요?", "다섯입니다.", "▁모릅니다 "),
]


def ranked(*responses, scores=(3, 2, 1)):
    """Return a row with a ranked list, best first by default."""
    return {"prompt": "q", "responses": list(responses), "scores": list(scores[: len(responses)])}


def conversation(template):
    """Return the turns of a prompt: several if the template is multi-turn."""
    turns = [("user", "Hello"), ("assistant", "Hi."), ("user", "And then? \n")]
    return turns[-1:] if template in ONE_EXCHANGE else turns


@pytest.mark.parametrize(
    ("template", "tokens"), [("tokenizer", "qwen"), *((name, made) for name in TEMPLATES for made in MAKERS)]
)
def test_prompt_and_completion_match_the_encoder(template, tokens):
    encoder = Encoder(tokenizer(tokens), template)
    turns = [{"role": role, "content": content} for role, content in conversation(template)]
    rows = [pair(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
    rows.append(pair(turns, *([{"role": "assistant", "content": text}] for text in ("Then 5.", "6"))))
    groups = prepared(rows, template=template, tokens=tokens).train
    assert len(groups) == len(rows)
    for row, group in zip(rows, (groups[index] for index in range(4)), strict=True):
        text_prompt = [Message("user", row["prompt"])] if isinstance(row["prompt"], str) else None
        prompt = text_prompt or [Message(role, content) for role, content in conversation(template)]
        assert group.prompt_ids.tolist() == encoder.encode_prompt(prompt)
        for ids, name in zip(group.completion_ids, ("chosen", "rejected"), strict=True):
            text = row[name] if isinstance(row[name], str) else row[name][0]["content"]
            encoded = encoder.encode([*prompt, Message("assistant", text)])
            joined = [*group.prompt_ids.tolist(), *ids.tolist()]
            # What follows EOS (ChatML's line feed) carries no loss and is dropped.
            assert encoded.input_ids[: len(joined)] == joined and not any(encoded.loss_mask[len(joined) :])
            assert all(encoded.loss_mask[len(group.prompt_ids) : len(joined)])
            assert ids[-1] in encoder.stop_ids


def test_groups_hold_scores_ranks_margins_locations():
    data = prepared([ranked("a", "b"), ranked("a", "b b", "\n\nc", scores=[1, 2, 2]), ranked("c", "d")])
    groups = data.train
    assert groups.num_completions.tolist() == [2, 3, 2]
    assert groups[1].scores.tolist() == [2.0, 2.0, 1.0] and groups[1].ranks.tolist() == [0, 0, 2]
    assert (groups[1].margin, groups[1].location, groups[1].row, groups[-1].row) == (1.0, "row 2", 1, 2)
    every = [groups[index] for index in range(3)]
    tokens = [len(group.prompt_ids) + sum(map(len, group.completion_ids)) for group in every]
    assert groups.lengths.tolist() == tokens and sum(tokens) == groups.num_tokens == data.report.tokens
    longest = max(len(group.prompt_ids) + len(ids) for group in every for ids in group.completion_ids)
    assert groups.longest == longest == data.report.longest
    assert groups.prompt_lengths[1] == len(groups[1].prompt_ids)
    assert groups.completion_lengths.sum() == data.report.trained_tokens
    with pytest.raises(IndexError):
        groups[3]


def test_pairs_without_scores_have_an_order_and_no_margin():
    [group] = [prepared([pair()]).train[0]]
    assert group.ranks.tolist() == [0, 1] and np.isnan(group.margin) and np.isnan(group.scores).all()


def test_truncation_is_minimal():
    prompt, long, short = list(range(10)), [20] * 8, [30]
    assert truncate_to(prompt, [long, short], LengthLimits(18, 4)) == (prompt, [long, short])
    assert truncate_to(prompt, [long, short], LengthLimits(17, 4)) == (prompt[1:], [long, short])
    assert truncate_to(prompt, [long, short], LengthLimits(17, 4), num_kept_start=1) == (
        [0, *prompt[2:]],
        [long, short],
    )
    assert truncate_to(prompt, [long, short], LengthLimits(10, 4)) == (prompt[6:], [long[:6], short])
    assert truncate_to(prompt[:2], [long], LengthLimits(6, 4)) == (prompt[:2], [long[:4]])


@pytest.mark.parametrize("seed", range(20))
def test_truncation_properties(seed):
    random = np.random.default_rng(seed)
    prompt = random.integers(0, 99, random.integers(1, 40)).tolist()
    many = [random.integers(0, 99, size).tolist() for size in random.integers(1, 40, random.integers(1, 5))]
    limits = LengthLimits(int(random.integers(8, 60)), 4)
    truncated_prompt, truncated = truncate_to(prompt, many, limits)
    assert prompt[len(prompt) - len(truncated_prompt) :] == truncated_prompt and len(truncated_prompt) >= min(
        len(prompt), 4
    )
    assert all(
        ids[: len(truncated_ids)] == truncated_ids and truncated_ids
        for ids, truncated_ids in zip(many, truncated, strict=True)
    )
    most = len(truncated_prompt) + max(map(len, truncated))
    assert most == min(limits.max_length, len(prompt) + max(map(len, many)))


def test_truncation_is_reported_and_keeps_bos_and_prompt_end():
    rows = [pair("early " * 40 + "late", "good " * 40, "bad"), pair()]
    untruncated = prepared(rows, tokens="llama2", max_length=1000).train[0]
    data = prepared(rows, tokens="llama2", max_length=60, max_prompt_length=20)
    truncated = data.train[0]
    encoder = Encoder(tokenizer("llama2"), "hh")
    assert truncated.prompt_ids[0] == untruncated.prompt_ids[0] == encoder.tokenizer.bos_token_id
    assert truncated.prompt_ids[1:].tolist() == untruncated.prompt_ids[-19:].tolist()
    assert truncated.completion_ids[0].tolist() == untruncated.completion_ids[0][:40].tolist()
    assert truncated.completion_ids[1].tolist() == untruncated.completion_ids[1].tolist()
    lost = len(untruncated.completion_ids[0]) - 40
    assert data.report.num_too_long == 1 and data.report.lost_tokens == lost > 0
    assert data.report.counts == {
        "longer than 60 tokens, prompt truncated on the left": 1,
        "longer than 60 tokens, completion truncated": 1,
    }


def test_half_the_length_is_the_prompt_s_by_default():
    data = prepared([pair("early " * 60, "good " * 60, "bad")], max_length=64)
    assert len(data.train[0].prompt_ids) == 32 and len(data.train[0].completion_ids[0]) == 32


def test_long_rows_can_be_dropped():
    data = prepared([pair("q", "good " * 60, "bad"), pair()], max_length=40, overflow="drop")
    assert data.train.locations == ("row 2",)
    assert data.report.counts == {"longer than 40 tokens, dropped": 1}


def test_completions_identical_after_truncation_are_dropped():
    same = "the same beginning " * 20
    lists = [(same + "a", "other", same + "b"), ("a", "b")]
    rows = [ranked(same + "a", same + "b"), *(ranked(*texts) for texts in lists)]
    data = prepared(
        [*rows, ranked(*lists[0], scores=(3, 1, 3)), ranked(*lists[0], scores=(3, 3, 1))], max_length=64
    )
    assert data.train.locations == ("row 2", "row 3", "row 4")
    assert data.train[0].ranks.tolist() == [0, 1] and data.train[0].scores.tolist() == [3.0, 2.0]
    counts = data.report.counts
    assert counts["dropped: completions with identical tokens after truncation"] == 1
    assert counts["with some completions of identical tokens after truncation"] == 3
    assert counts["dropped: only tied completions are distinct after truncation"] == 1


def test_markers_in_completions_are_escaped_and_reported():
    data = prepared([pair("q", "yes\n\nHuman: no", "bad"), pair()])
    [what] = data.report.counts
    assert what == "contain template markers in their text (escaped)"
