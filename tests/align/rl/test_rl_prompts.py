"""RL prompts: every layout, dropped rows and their counts, and the same token ids as chat."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_tokenizers import tokenizer

from align.rl.prompts import (
    EMPTY_TURN,
    NO_QUESTION,
    NO_TEMPLATE,
    load_prompts,
    longest_prompt,
    prepare_prompts,
)
from align.rl.settings import PromptSettings
from data_templates._segments import Message
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.settings import TrainSettings
from finetune.training.text import Text

ROOT = Path(__file__).parents[3]
DATA = ROOT / "../shared/data"

HI, ASKED = Message("user", "Hi"), (Message("user", "Hi"),)
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
SHARE_GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]

LAYOUTS = [
    ("prompt", {"prompt": "Hi"}, ASKED, None),
    ("prompt", {"prompt": TURNS[:1]}, ASKED, None),
    ("prompt", {"prompt": DIALOGUE}, (HI, Message("assistant", "Hello."), Message("user", "Why?")), None),
    ("prompt", {"prompt": "Hi", "system": "S"}, (Message("system", "S"), HI), None),
    ("instruction", {"instruction": "Hi", "input": "there"}, (Message("user", "Hi", "there"),), None),
    ("question", {"question": "Hi"}, ASKED, None),
    ("Alpaca", {"instruction": "Hi", "input": "", "output": "Yes"}, ASKED, "Yes"),
    ("Alpaca", {"instruction": "Hi", "input": "", "output": ""}, ASKED, None),
    ("messages", {"messages": TURNS}, ASKED, "Yes"),
    ("messages", {"messages": TURNS[:1]}, ASKED, None),
    ("messages", {"messages": [*TURNS, *TURNS[:1]]}, (HI, Message("assistant", "Yes"), HI), None),
    ("ShareGPT", {"conversations": SHARE_GPT}, ASKED, "Yes"),
    ("prompt/completion", {"prompt": "Hi", "completion": "Yes"}, ASKED, "Yes"),
    ("prompt/response", {"prompt": "Hi", "response": "Yes"}, ASKED, "Yes"),
    ("question/answer", {"question": "Hi", "answer": "Yes"}, ASKED, "Yes"),
    ("inputs/targets", {"inputs": "Hi", "targets": "Yes"}, ASKED, "Yes"),
    ("question/rationale/answer", {"question": "Hi", "rationale": "so", "answer": "1"}, ASKED, "so\n#### 1"),
    ("T0 tasks", {"task": "t", "prompt": "Hi", "completion": "Yes<|endoftext|>"}, ASKED, "Yes"),
    ("prompt/chosen/rejected", {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, ASKED, "Yes"),
    (
        "chosen/rejected",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        ASKED,
        "Yes",
    ),
    ("prompt/responses/scores", {"prompt": "Hi", "responses": ["No", "Yes"], "scores": [1, 2]}, ASKED, "Yes"),
    ("prompt/completion/label", {"prompt": "Hi", "completion": "Yes", "label": True}, ASKED, "Yes"),
    ("prompt/completion/label", {"prompt": "Hi", "completion": "No", "label": False}, ASKED, None),
]


def prepared(rows, *, template="chatml", tokens="qwen", longest=512, seed=0, **settings):
    """Return rows or a file as prompts, without a cache by default."""
    data = PromptSettings(**{"source": rows, "template": template, "cache": False, **settings})
    encoder = Encoder(tokenizer(tokens), template)
    return prepare_prompts(data, encoder, max_prompt_length=longest, seed=seed)


def numbered(count):
    """Return different prompts."""
    return [{"prompt": f"question {number}"} for number in range(count)]


@pytest.mark.parametrize(("name", "row", "talk", "expected"), LAYOUTS)
def test_every_layout_asks_and_keeps_its_reply_for_readers(name, row, talk, expected):
    data = prepared([row])
    [prompt] = data.train
    assert data.report.layout == name
    assert (prompt.talk, prompt.expected, prompt.place) == (talk, expected, "row 1")


@pytest.mark.parametrize(("template", "tokens"), [("chatml", "qwen"), ("llama2", "llama2"), ("hh", "llama2")])
def test_the_ids_are_those_that_chat_writes(template, tokens):
    data = prepared([{"prompt": DIALOGUE}, {"prompt": "Hi"}], template=template, tokens=tokens)
    encoder = Encoder(tokenizer(tokens), template)
    for prompt in data.train:
        assert list(prompt.ids) == encoder.encode_prompt(prompt.talk)
        assert len(prompt.ids) > 3 and prompt.ids[0] != prompt.ids[1], "no BOS twice"
    assert data.train.lengths == [len(prompt.ids) for prompt in data.train]


def test_a_wish_of_the_start_stands_behind_what_is_asked():
    encoder = Encoder(tokenizer("qwen"), "chatml", wish="Be good.")
    data = PromptSettings(source=[{"prompt": "Hi"}], template="chatml", cache=False)
    [prompt] = prepare_prompts(data, encoder, max_prompt_length=512, seed=0).train
    assert list(prompt.ids) == encoder.encode_prompt(ASKED)
    assert "Be good." in encoder.tokenizer.decode(prompt.ids) and prompt.talk == ASKED


def test_longer_prompts_are_left_out_and_told():
    data = prepared([{"prompt": "Hi"}, {"prompt": "long " * 50}], longest=20)
    assert data.train.places == ["row 1"] and data.report.too_long == 1
    assert data.report.lines()[1] == "rows longer than 20 tokens, dropped: 1 (first: row 2)"


def test_longer_prompts_lose_their_beginning_but_not_the_token_that_begins_them():
    rows = [{"prompt": "a b c d e f g h i j k l m n o p"}]
    whole = prepared(rows, template="vicuna", tokens="llama2").train[0].ids
    data = prepared(rows, template="vicuna", tokens="llama2", longest=12, too_long="cut")
    bos = tokenizer("llama2").bos_token_id
    assert data.train[0].ids == (bos, *whole[-11:]) and whole[0] == bos
    assert data.report.lines()[1] == "rows longer than 12 tokens, truncated: 1 (first: row 1)"
    assert data.report.lost_tokens == len(whole) - 12


def test_what_asks_nothing_is_counted():
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "  "}]},
    ]
    data = prepared(rows)
    assert data.train.places == ["row 1"]
    assert data.report.counts == {NO_QUESTION: 1, EMPTY_TURN: 1}
    assert data.report.examples == {NO_QUESTION: "row 2", EMPTY_TURN: "row 3"}


def test_copies_are_counted_and_kept():
    data = prepared([{"prompt": "Hi"}, {"prompt": "Ho"}, {"prompt": "Hi"}])
    assert len(data.train) == 3
    assert data.report.lines()[1:] == [
        "rows identical to an earlier row (not dropped): 1 (first: row 3 repeats row 1)"
    ]


def test_a_share_held_out_holds_whole_prompts():
    rows = numbered(20) + numbered(20)
    data = prepared(rows, held_out=0.2)
    learnt, measured = ({prompt.talk for prompt in part} for part in (data.train, data.held_out))
    assert len(data.held_out) == 8 and len(measured) == 4 and not learnt & measured
    assert data.held_out.places == prepared(rows, held_out=0.2).held_out.places
    assert data.held_out.places != prepared(rows, held_out=0.2, seed=1).held_out.places
    assert [row.messages[-1] for row in data.conversations] == [Message("assistant", "")] * 8


def test_a_held_out_file_is_read_and_compared(tmp_path):
    file = tmp_path / "apart.jsonl"
    file.write_text('{"prompt": "question 1"}\n{"prompt": "new"}\n', encoding="utf-8")
    data = prepared(numbered(3), held_out=str(file))
    assert [prompt.talk[0].content for prompt in data.held_out] == ["question 1", "new"]
    assert data.report.counts == {"held out: identical to a training row": 1}
    assert data.report.lines()[0].startswith("3 prompts (prompt), 2 held out; ")


def test_a_mixture_is_drawn_with_the_seed(tmp_path):
    for name, count in (("a", 6), ("b", 30)):
        rows = "".join(f'{{"prompt": "{name} {number}"}}\n' for number in range(count))
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    sources = [{"source": str(tmp_path / f"{name}.jsonl"), "weight": 1.0} for name in "ab"]
    mixed = {"source": None, "mix": sources}
    data = prepared(None, **mixed)
    assert [row.source for row in data.train].count(1) == 6 and len(data.train) == 12
    assert [source.rows for source in data.report.sources] == [6, 6]
    assert data.train == prepared(None, **mixed).train != prepared(None, seed=1, **mixed).train


def test_rows_are_selected():
    data = prepared(numbered(9), select={"rows": 4})
    assert len(data.train) == 4
    assert data.report.counts == {"dropped: select.rows=4": 5}


def test_prompts_come_from_the_cache_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = [*numbered(3), {"prompt": "long " * 50}]
    first, again = (prepared(rows, longest=30, cache=True) for _ in range(2))
    assert (first.report.from_cache, again.report.from_cache) == (False, True)
    assert again.train == first.train and again.report.counts == first.report.counts


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "no rows"),
        ([{"prompt": ""}], "nothing to answer"),
        ([{"other": "Hi"}], "no known layout has columns other"),
        ([{"prompt": 3}], "found 3"),
    ],
)
def test_nothing_to_answer_is_one_clear_message(rows, told):
    with pytest.raises(UserError) as caught:
        prepared(rows)
    assert told in str(caught.value)


def test_prompts_that_are_all_too_long_are_one_clear_message():
    with pytest.raises(UserError, match=r"nothing to answer: rows longer than 4 tokens, dropped: 2"):
        prepared(numbered(2), longest=4)


def text(context=64, longest=64):
    """Return template and tokenizer with a context length."""
    return Text(Encoder(tokenizer("qwen"), "chatml"), context, 0, longest)


def test_prompt_and_reply_must_fit_the_model():
    assert longest_prompt(PromptSettings(), text(), room=24) == (
        40,
        "24 tokens are reserved for the completion",
    )
    assert longest_prompt(PromptSettings(max_prompt_length=40), text(), room=24) == (40, "as requested")
    assert longest_prompt(PromptSettings(), text(4096, 2048), room=48)[0] == 2000
    with pytest.raises(UserError, match=r"data.max_prompt_length=39"):
        longest_prompt(PromptSettings(max_prompt_length=40), text(), room=25)
    with pytest.raises(UserError, match=r"sampling.max_new_tokens: 60 of a context length of 64"):
        longest_prompt(PromptSettings(), text(), room=60)


def test_loading_tells_what_was_found():
    said, chosen = [], {}
    job = SimpleNamespace(
        recipe=SimpleNamespace(settings=SimpleNamespace(train=TrainSettings())),
        say=said.append,
        choose=lambda key, choice: chosen.setdefault(key, choice)[0],
        timed=lambda phase: nullcontext(),
    )
    settings = PromptSettings(source=numbered(3), template="chatml", cache=False)
    data = load_prompts(job, settings, text(), room=24)
    assert said == data.report.lines() and chosen == {
        "data.max_prompt_length": (40, "24 tokens are reserved for the completion")
    }


@pytest.mark.parametrize(("part", "rows"), [("train", 781), ("held_out", 120)])
def test_the_embedded_prompts_are_all_usable(part, rows):
    data = prepared(str(ROOT / f"recipes/tiny/data/prompts_{part}.jsonl"), template="alpaca")
    assert len(data.train) == rows and data.report.layout == "prompt" and data.report.counts == {}


PUBLISHED = [
    ("korean/kochatgpt_3_PPO.jsonl", "koalpaca", "prompt", 10865),
    ("hh_rlhf/harmless-base/test.jsonl.gz", "hh", "chosen/rejected", 206),
    ("gsm8k/test.jsonl", "cot", "question/answer", 500),
    ("alpaca/gpteacher_roleplay.json", "alpaca", "Alpaca", 2759),
    ("chat/fastchat_dummy_conversation.json", "vicuna", "ShareGPT", 500),
    ("llamafactory/dpo_en_demo.json", "chatml", "ShareGPT with ranking", 300),
    ("llamafactory/kto_en_demo.json", "chatml", "messages with label", 300),
    ("redteam/harmless_instructions.jsonl.gz", "alpaca", "instruction", 6000),
    ("preference/constitutional_policy_samples.jsonl.gz", "hh", "prompt", 47),
    ("preference/alpaca_eval_ranked.jsonl.gz", "alpaca", "instruction with scored answers", 563),
    ("preference/pandalm_human_pairs.json", "alpaca", "PandaLM votes", 790),
    ("korean/logickor_ranked.jsonl.gz", "koalpaca", "questions with judged answers", 32),
]


@pytest.mark.parametrize(("path", "template", "layout", "rows"), PUBLISHED)
def test_published_files(path, template, layout, rows):
    if not (DATA / path).is_file():
        pytest.skip("published data sets are not here")
    data = prepared(str(DATA / path), template=template, longest=65536)
    lost = {what: number for what, number in data.report.counts.items() if "dropped: " in what}
    assert data.report.layout == layout and len(data.train) + sum(lost.values()) == rows
    assert set(lost) <= {EMPTY_TURN, NO_TEMPLATE} and sum(lost.values()) < 0.03 * rows
    assert all(prompt.talk[-1].role == "user" for prompt in data.train)
