"""Published datasets, in their published formats, are parsed and encoded completely."""

from pathlib import Path

import pytest
from small_tokenizers import tokenizer

from data_templates.segments import REPLY_ROLES, TemplateError
from finetune.data.conversation import render_reply
from finetune.data.layouts import detect_layout
from finetune.data.rows import parse_rows
from finetune.data.sources import read_source
from finetune.data.tokens import Encoder

DATA = Path(__file__).parents[3] / "../shared/data"
DOLLY = {"question": "instruction", "answer": "output"}
ENCODED = 200
"""Rows of each file that are tokenized; all are parsed to conversations."""


@pytest.mark.parametrize(
    ("path", "rows", "layout", "columns", "template"),
    [
        ("alpaca/alpaca_data.json", 18887, "Alpaca", None, "alpaca"),
        ("korean/ko_alpaca_data.json", 10244, "Alpaca", None, "koalpaca"),
        ("chat/fastchat_dummy_conversation.json", None, "ShareGPT", None, "vicuna"),
        ("llamafactory/alpaca_en_demo.json", 999, "Alpaca", None, "alpaca"),
        ("llamafactory/identity.json", None, "Alpaca", None, "chatml"),
        ("gsm8k/train.jsonl", 7473, "question/answer", None, "llama2"),
        ("alpaca/dolly_3k.jsonl.gz", 2719, "question/answer", DOLLY, "plain"),
        ("alpaca/gpteacher_roleplay.json", 2759, "Alpaca", None, "alpaca"),
        ("alpaca/gpteacher_toolformer.json", 2105, "Alpaca", None, "alpaca"),
        ("llamafactory/glaive_toolcall_en_demo.json", 300, "ShareGPT", None, "toolcall"),
        ("t0/t0_prompted_tasks.jsonl.gz", 5100, "T0 tasks", None, "flan"),
        ("t0/t0_prompted_tasks.jsonl.gz", 5100, "T0 tasks", None, "plain"),
        ("alpaca/dolly_3k.jsonl.gz", 2719, "question/answer", DOLLY, "flan"),
        ("gsm8k/train.jsonl", 7473, "question/answer", None, "cot"),
        ("chat/fastchat_dummy_conversation.json", None, "ShareGPT", None, "llama3"),
        ("korean/ko_alpaca_data.json", 10244, "Alpaca", None, "kullm"),
        ("korean/ko_alpaca_data.json", 10244, "Alpaca", None, "exaone"),
        ("korean/ChatbotData.csv", None, "prompt/completion", {"prompt": "Q", "completion": "A"}, "koalpaca"),
    ],
)
def test_published_files_are_read_and_encoded(path, rows, layout, columns, template):
    if not (DATA / path).is_file():
        pytest.skip("published data sets are not here")
    source = read_source(str(DATA / path))
    assert rows is None or len(source) == rows
    actual = detect_layout(source[0].columns, columns=columns)
    assert actual.name == layout
    conversations = parse_rows(source, actual, columns)
    assert len(conversations) == len(source)
    encoder = Encoder(tokenizer("qwen"), template)
    some = conversations[:ENCODED]
    for conversation, encoded in zip(some, encoder.encode_many(some), strict=True):
        assert not isinstance(encoded, TemplateError)
        # The first trained run is the first reply and its end, to the character.
        start = encoded.loss_mask.index(True)
        stop = next(
            i for i in range(start, len(encoded.loss_mask)) if encoded.input_ids[i] in encoder.stop_ids
        )
        first = next(number for number, turn in enumerate(conversation) if turn.role in REPLY_ROLES)
        reply = render_reply(conversation[: first + 1], encoder)[-1].content
        assert encoder.decode_reply(encoded.input_ids[start : stop + 1]) == reply
        if template not in ("cot", "toolcall") and not encoded.num_escaped:
            assert reply == conversation[first].content.strip()
