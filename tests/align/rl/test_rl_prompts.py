"""RL prompts: every layout, dropped rows and their counts, and the same token ids as chat."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_tokenizers import tokenizer

from align.rl.prompt_rows import EMPTY_PROMPT_TURN, NO_USER_TURN
from align.rl.prompts import (
    TEMPLATE_MISMATCH,
    load_prompts,
    prepare_prompts,
    resolve_max_prompt_length,
)
from align.rl.settings import PromptSettings
from data_templates.segments import Message
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.settings import TrainSettings
from finetune.training.model import TextEncoding

ROOT = Path(__file__).parents[3]
DATA = ROOT / "../shared/data"

HI, MESSAGES = Message("user", "Hi"), (Message("user", "Hi"),)
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
SHARE_GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]

LAYOUTS = [
    ("prompt", {"prompt": "Hi"}, MESSAGES, None),
    ("prompt", {"prompt": TURNS[:1]}, MESSAGES, None),
    ("prompt", {"prompt": DIALOGUE}, (HI, Message("assistant", "Hello."), Message("user", "Why?")), None),
    ("prompt", {"prompt": "Hi", "system": "S"}, (Message("system", "S"), HI), None),
    ("instruction", {"instruction": "Hi", "input": "there"}, (Message("user", "Hi", "there"),), None),
    ("question", {"question": "Hi"}, MESSAGES, None),
    ("Alpaca", {"instruction": "Hi", "input": "", "output": "Yes"}, MESSAGES, "Yes"),
    ("Alpaca", {"instruction": "Hi", "input": "", "output": ""}, MESSAGES, None),
    ("messages", {"messages": TURNS}, MESSAGES, "Yes"),
    ("messages", {"messages": TURNS[:1]}, MESSAGES, None),
    ("messages", {"messages": [*TURNS, *TURNS[:1]]}, (HI, Message("assistant", "Yes"), HI), None),
    ("ShareGPT", {"conversations": SHARE_GPT}, MESSAGES, "Yes"),
    ("prompt/completion", {"prompt": "Hi", "completion": "Yes"}, MESSAGES, "Yes"),
    ("prompt/response", {"prompt": "Hi", "response": "Yes"}, MESSAGES, "Yes"),
    ("question/answer", {"question": "Hi", "answer": "Yes"}, MESSAGES, "Yes"),
    ("inputs/targets", {"inputs": "Hi", "targets": "Yes"}, MESSAGES, "Yes"),
    (
        "question/rationale/answer",
        {"question": "Hi", "rationale": "so", "answer": "1"},
        MESSAGES,
        "so\n#### 1",
    ),
    ("T0 tasks", {"task": "t", "prompt": "Hi", "completion": "Yes<|endoftext|>"}, MESSAGES, "Yes"),
    ("prompt/chosen/rejected", {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, MESSAGES, "Yes"),
    (
        "chosen/rejected",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        MESSAGES,
        "Yes",
    ),
    (
        "prompt/responses/scores",
        {"prompt": "Hi", "responses": ["No", "Yes"], "scores": [1, 2]},
        MESSAGES,
        "Yes",
    ),
    ("prompt/completion/label", {"prompt": "Hi", "completion": "Yes", "label": True}, MESSAGES, "Yes"),
    ("prompt/completion/label", {"prompt": "Hi", "completion": "No", "label": False}, MESSAGES, None),
]


def prepare(rows, *, template="chatml", tokens="qwen", max_prompt_length=512, seed=0, **settings):
    """Return rows or a file as prompts, without a cache by default."""
    data = PromptSettings(**{"source": rows, "template": template, "cache": False, **settings})
    encoder = Encoder(tokenizer(tokens), template)
    return prepare_prompts(data, encoder, max_prompt_length=max_prompt_length, seed=seed)


def numbered_prompts(count):
    """Return different prompts."""
    return [{"prompt": f"question {number}"} for number in range(count)]


@pytest.mark.parametrize(("name", "row", "talk", "expected"), LAYOUTS)
def test_every_layout_gives_prompt_and_reference_answer(name, row, talk, expected):
    data = prepare([row])
    [prompt] = data.train
    assert data.report.layout == name
    assert (prompt.messages, prompt.expected, prompt.location) == (talk, expected, "row 1")


@pytest.mark.parametrize(("template", "tokens"), [("chatml", "qwen"), ("llama2", "llama2"), ("hh", "llama2")])
def test_prompt_ids_equal_those_of_chat(template, tokens):
    data = prepare([{"prompt": DIALOGUE}, {"prompt": "Hi"}], template=template, tokens=tokens)
    encoder = Encoder(tokenizer(tokens), template)
    for prompt in data.train:
        assert list(prompt.ids) == encoder.encode_prompt(prompt.messages)
        assert len(prompt.ids) > 3 and prompt.ids[0] != prompt.ids[1], "no BOS twice"
    assert data.train.lengths == [len(prompt.ids) for prompt in data.train]


def test_control_suffix_is_appended_to_the_prompt():
    encoder = Encoder(tokenizer("qwen"), "chatml", control_suffix="Be good.")
    data = PromptSettings(source=[{"prompt": "Hi"}], template="chatml", cache=False)
    [prompt] = prepare_prompts(data, encoder, max_prompt_length=512, seed=0).train
    assert list(prompt.ids) == encoder.encode_prompt(MESSAGES)
    assert "Be good." in encoder.tokenizer.decode(prompt.ids) and prompt.messages == MESSAGES


def test_long_prompts_are_dropped_and_counted():
    data = prepare([{"prompt": "Hi"}, {"prompt": "long " * 50}], max_prompt_length=20)
    assert data.train.locations == ["row 1"] and data.report.num_too_long == 1
    assert data.report.lines()[1] == "rows longer than 20 tokens, dropped: 1 (first: row 2)"


def test_long_prompts_are_truncated_from_the_left_but_retain_bos():
    rows = [{"prompt": "a b c d e f g h i j k l m n o p"}]
    full_ids = prepare(rows, template="vicuna", tokens="llama2").train[0].ids
    data = prepare(rows, template="vicuna", tokens="llama2", max_prompt_length=12, overflow="truncate")
    bos = tokenizer("llama2").bos_token_id
    assert data.train[0].ids == (bos, *full_ids[-11:]) and full_ids[0] == bos
    assert data.report.lines()[1] == "rows longer than 12 tokens, truncated: 1 (first: row 1)"
    assert data.report.lost_tokens == len(full_ids) - 12


def test_rows_without_prompt_are_counted():
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "  "}]},
    ]
    data = prepare(rows)
    assert data.train.locations == ["row 1"]
    assert data.report.counts == {NO_USER_TURN: 1, EMPTY_PROMPT_TURN: 1}
    assert data.report.examples == {NO_USER_TURN: "row 2", EMPTY_PROMPT_TURN: "row 3"}


def test_duplicates_are_counted_and_retained():
    data = prepare([{"prompt": "Hi"}, {"prompt": "Ho"}, {"prompt": "Hi"}])
    assert len(data.train) == 3
    assert data.report.lines()[1:] == [
        "rows identical to an earlier row (not dropped): 1 (first: row 3 repeats row 1)"
    ]


def test_held_out_fraction_splits_by_prompt():
    rows = numbered_prompts(20) + numbered_prompts(20)
    data = prepare(rows, held_out=0.2)
    train, held_out = ({prompt.messages for prompt in split} for split in (data.train, data.held_out))
    assert len(data.held_out) == 8 and len(held_out) == 4 and not train & held_out
    assert data.held_out.locations == prepare(rows, held_out=0.2).held_out.locations
    assert data.held_out.locations != prepare(rows, held_out=0.2, seed=1).held_out.locations
    assert [row.messages[-1] for row in data.prompts] == [Message("assistant", "")] * 8


def test_a_held_out_file_is_read_and_compared(tmp_path):
    file = tmp_path / "apart.jsonl"
    file.write_text('{"prompt": "question 1"}\n{"prompt": "new"}\n', encoding="utf-8")
    data = prepare(numbered_prompts(3), held_out=str(file))
    assert [prompt.messages[0].content for prompt in data.held_out] == ["question 1", "new"]
    assert data.report.counts == {"held out: identical to a training row": 1}
    assert data.report.lines()[0].startswith("3 prompts (prompt), 2 held out; ")


def test_mixture_sampling_depends_on_the_seed(tmp_path):
    for name, count in (("a", 6), ("b", 30)):
        rows = "".join(f'{{"prompt": "{name} {number}"}}\n' for number in range(count))
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    sources = [{"source": str(tmp_path / f"{name}.jsonl"), "weight": 1.0} for name in "ab"]
    mixed = {"source": None, "mix": sources}
    data = prepare(None, **mixed)
    assert [row.source_index for row in data.train].count(1) == 6 and len(data.train) == 12
    assert [source.rows for source in data.report.sources] == [6, 6]
    same, other = (list(prepare(None, seed=seed, **mixed).train) for seed in (0, 1))
    assert list(data.train) == same != other


def test_rows_are_selected():
    data = prepare(numbered_prompts(9), select={"rows": 4})
    assert len(data.train) == 4
    assert data.report.counts == {"dropped: select.rows=4": 5}


def test_cached_prompts_are_identical(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = [*numbered_prompts(3), {"prompt": "long " * 50}]
    first, cached = (prepare(rows, max_prompt_length=30, cache=True) for _ in range(2))
    assert (first.report.from_cache, cached.report.from_cache) == (False, True)
    assert list(cached.train) == list(first.train) and cached.report.counts == first.report.counts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"prompt": ""}], "nothing to answer"),
        ([{"other": "Hi"}], "no known layout has columns other"),
        ([{"prompt": 3}], "found 3"),
    ],
)
def test_no_prompts_is_reported(rows, message):
    with pytest.raises(UserError) as error:
        prepare(rows)
    assert message in str(error.value)


def test_only_long_prompts_is_reported():
    with pytest.raises(UserError, match=r"nothing to answer: rows longer than 4 tokens, dropped: 2"):
        prepare(numbered_prompts(2), max_prompt_length=4)


def text(context=64, max_length=64):
    """Return template and tokenizer with a context length."""
    return TextEncoding(Encoder(tokenizer("qwen"), "chatml"), context, 0, max_length)


def test_prompt_and_completion_must_fit_the_context():
    assert resolve_max_prompt_length(PromptSettings(), text(), max_new_tokens=24) == (
        40,
        "24 tokens are reserved for the completion",
    )
    assert resolve_max_prompt_length(PromptSettings(max_prompt_length=40), text(), max_new_tokens=24) == (
        40,
        "as requested",
    )
    assert resolve_max_prompt_length(PromptSettings(), text(4096, 2048), max_new_tokens=48)[0] == 2000
    with pytest.raises(UserError, match=r"data.max_prompt_length=39"):
        resolve_max_prompt_length(PromptSettings(max_prompt_length=40), text(), max_new_tokens=25)
    with pytest.raises(UserError, match=r"sampling.max_new_tokens: 60 of a context length of 64"):
        resolve_max_prompt_length(PromptSettings(), text(), max_new_tokens=60)


def test_loading_logs_the_data_report():
    logged, resolved = [], {}
    ctx = SimpleNamespace(
        recipe=SimpleNamespace(settings=SimpleNamespace(train=TrainSettings())),
        log=logged.append,
        resolve_auto=lambda key, choice: resolved.setdefault(key, choice)[0],
        timed=lambda phase: nullcontext(),
    )
    settings = PromptSettings(source=numbered_prompts(3), template="chatml", cache=False)
    data = load_prompts(ctx, settings, text(), max_new_tokens=24)
    assert logged == data.report.lines() and resolved == {
        "data.max_prompt_length": (40, "24 tokens are reserved for the completion")
    }


@pytest.mark.parametrize(("part", "rows"), [("train", 781), ("held_out", 120)])
def test_the_embedded_prompts_are_all_usable(part, rows):
    data = prepare(str(ROOT / f"recipes/tiny/data/prompts_{part}.jsonl"), template="alpaca")
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
    data = prepare(str(DATA / path), template=template, max_prompt_length=65536)
    dropped = {reason: count for reason, count in data.report.counts.items() if "dropped: " in reason}
    assert data.report.layout == layout and len(data.train) + sum(dropped.values()) == rows
    assert set(dropped) <= {EMPTY_PROMPT_TURN, TEMPLATE_MISMATCH} and sum(dropped.values()) < 0.03 * rows
    assert all(prompt.messages[-1].role == "user" for prompt in data.train)
