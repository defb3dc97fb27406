"""Documents for continued pretraining: rows, loss mask, held-out split."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import MAKERS
from small_tokenizers import tokenizer as small_tokenizer

from data_templates.segments import Message
from finetune.data.collate import PackedCollator, PaddedCollator
from finetune.data.dataset import PreparedData, TokenizedRows
from finetune.data.documents import documents_to_rows, prepare_documents
from finetune.data.files import data_fingerprint
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.settings import DocumentSettings


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(source: Any, *, max_length: int = 40, kind: str = "llama3", **settings: Any) -> PreparedData:
    data = DocumentSettings(**{"source": source, **settings})
    encoder = Encoder(small_tokenizer(kind), data.template)
    return prepare_documents(data, encoder, max_length=max_length, seed=0)


def ids(rows: TokenizedRows) -> list[int]:
    return [int(token) for index in range(len(rows)) for token in rows[index]["input_ids"]]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


TEXTS = ["The first document.\nIt has two lines.", "문서 둘입니다.", "A third one, " + "long " * 30 + "end."]


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_documents_are_concatenated_with_eos(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    data = read([{"text": text} for text in TEXTS], kind=kind)
    expected = []
    for text in TEXTS:
        expected += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert ids(data.train) == expected[: data.train.num_tokens]
    assert len(expected) - data.train.num_tokens in (0, 1)
    assert data.train.lengths[:-1] == [40] * (len(data.train) - 1)


@pytest.mark.parametrize("packing", [False, True])
def test_every_token_is_trained_except_the_first_of_a_row_or_piece(packing: bool) -> None:
    data = read([{"text": text} for text in TEXTS], packing=packing)
    rows = [data.train[index] for index in range(len(data.train))]
    untrained = sum(len(row.get("document_lengths", [0])) for row in rows)
    assert data.report.trained_tokens == data.train.num_tokens - untrained
    for row in rows:
        begins = np.cumsum([0, *row.get("document_lengths", [])])[:-1].tolist() if packing else [0]
        trained = row["labels"] != -100
        assert [index for index, flag in enumerate(trained.tolist()) if not flag] == begins
        assert torch.equal(row["labels"][trained], row["input_ids"][trained])


def test_packed_rows_contain_complete_documents() -> None:
    texts = [f"Document {number}: " + "word " * (number % 5) for number in range(30)]
    tokenizer = small_tokenizer("llama3")
    full = {(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts}
    data = read([{"text": text} for text in texts], packing=True, max_length=64)
    actual = []
    for index in range(len(data.train)):
        row = data.train[index]
        assert len(row["input_ids"]) <= 64 and sum(row["document_lengths"]) == len(row["input_ids"])
        actual += [tuple(part.tolist()) for part in torch.split(row["input_ids"], row["document_lengths"])]
    assert sorted(actual) == sorted(full) and len(data.train) < len(texts) / 2


def test_packed_position_ids_restart_at_each_document() -> None:
    data = read([{"text": text} for text in TEXTS[:2]], packing=True, max_length=100)
    [row] = [data.train[index] for index in range(len(data.train))]
    first, second = row["document_lengths"]
    batch = PackedCollator(0)([row])
    assert batch["position_ids"].tolist() == [[*range(first), *range(second)]]
    assert batch["labels"][0, first] == -100
    blocks = read([{"text": text} for text in TEXTS[:2]], max_length=100)
    padded = PaddedCollator(0)([blocks.train[0]])
    assert (
        padded["attention_mask"].all() and padded["labels"][0, first] == blocks.train[0]["input_ids"][first]
    )


def test_text_files_are_split_at_the_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\none\n\ntwo\r\nlines\n\n\n\nthree\n")
    data = read(path, separator="\n\n", max_length=500)
    text = small_tokenizer("llama3").decode(ids(data.train))
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    assert text == f"{begin}one{end}{begin}two\nlines{end}{begin}three{end}"
    assert "documents: 3 and" in data.report.layout and data.train.locations == [f"{path}:2"]


def test_a_file_is_one_document_without_a_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.md", "# Title\n\nfirst\n\nsecond\n")
    data = read(path, max_length=500)
    assert "documents: 1 and" in data.report.layout and len(data.train) == 1
    text = small_tokenizer("llama3").decode(ids(data.train), skip_special_tokens=True)
    assert text == "# Title\n\nfirst\n\nsecond"


def test_a_folder_of_everything_and_the_folders_in_it(tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "a.txt", "from a text")
    write(tmp_path / "corpus" / "deep" / "b.md", "from a page")
    write(tmp_path / "corpus" / "c.jsonl", json.dumps({"text": "from a row"}) + "\n")
    write(tmp_path / "corpus" / ".git" / "d.txt", "hidden")
    write(tmp_path / "corpus" / "e.py", "no text")
    settings = DocumentSettings(source=str(tmp_path / "corpus"))
    before = data_fingerprint(settings)
    data = read(str(tmp_path / "corpus"), max_length=500)
    text = small_tokenizer("llama3").decode(ids(data.train), skip_special_tokens=True)
    parts = ("from a text", "from a page", "from a row", "hidden")
    assert [part for part in parts if part in text] == ["from a text", "from a page", "from a row"]
    write(tmp_path / "corpus" / "deep" / "b.md", "changed")
    assert data_fingerprint(settings) != before


def test_held_out_documents_are_not_trained(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n".join(f"document number {number} ends" for number in range(40)))
    data = read(path, separator="\n", held_out=0.25, packing=True, max_length=64)
    decode = small_tokenizer("llama3").decode
    trained, held = (decode(ids(rows), skip_special_tokens=True) for rows in (data.train, data.held_out))
    numbers = [[number for number in range(40) if f" {number} ends" in text] for text in (trained, held)]
    assert len(numbers[1]) == 10 and sorted(numbers[0] + numbers[1]) == list(range(40))
    assert "documents: 30 and 10 held out" in data.report.layout


def test_the_tail_of_a_single_text_is_held_out(tmp_path: Path) -> None:
    lines = [f"line {number} of the book" for number in range(400)]
    path = write(tmp_path / "book.txt", "\n".join(lines))
    data = read(path, held_out=0.2, max_length=64)
    decode = small_tokenizer("llama3").decode
    trained, held = (decode(ids(rows), skip_special_tokens=True) for rows in (data.train, data.held_out))
    cut = len(trained.split("\n"))
    assert trained.split("\n")[:3] == lines[:3] and 315 <= cut <= 325
    assert held.startswith(f"line {held.split()[1]} of") and lines[399] in held
    assert data.train.locations[0] == data.held_out.locations[0] == path
    assert (
        all(conversation.messages[0].content in held for conversation in data.prompts)
        and len(data.prompts) > 1
    )
    words = {"line", "of", "the", "book\nline", *map(str, range(400))}
    assert {conversation.messages[0].content.split(" ")[0] for conversation in data.prompts} <= words
    with pytest.raises(UserError, match=r"data\.held_out: 1 of 1 usable rows"):
        read(path, held_out=1, max_length=64)
    single_line = write(tmp_path / "line.txt", "word " * 100)
    with pytest.raises(UserError, match=r"data\.held_out: the last 20% of \S+ has no complete line"):
        read(single_line, held_out=0.2)


def test_samples_are_passages_with_their_continuation() -> None:
    text = "In the beginning there was a text that went on and on"
    data = read([{"text": text}, {"text": "word"}])
    [conversation] = data.prompts
    question, answer = conversation.messages
    assert question.content + answer.content == text
    assert answer.content.startswith(" ") and abs(len(question.content) - len(text) / 2) < 10
    encoder = Encoder(small_tokenizer("llama3"), "plain")
    assert encoder.encode_prompt([question]) == small_tokenizer("llama3")(question.content)["input_ids"]


def test_samples_of_many_texts_and_of_texts_without_spaces() -> None:
    texts = [{"text": f"the text with the number {number}"} for number in range(300)]
    many = read(texts, held_out=290)
    requested = [int(conversation.messages[1].content.split()[-1]) for conversation in many.prompts]
    assert len(requested) == 64 and requested == sorted(requested) and max(requested) > 200
    [conversation] = read([{"text": "那" * 30}]).prompts
    assert [len(message.content) for message in conversation.messages] == [15, 15]
    full = [{"instruction": f"question {number}", "output": "a"} for number in range(100)]
    assert len(read(full, template="alpaca", held_out=80).prompts) == 80


def test_conversations_are_rendered_with_the_template_and_fully_trained() -> None:
    rows = [{"instruction": "Add 2 and 3.", "output": "five"}]
    data = read(rows, template="alpaca", max_length=500)
    text = small_tokenizer("llama3").decode(ids(data.train))
    assert text.startswith("<|begin_of_text|>Below is an instruction") and text.endswith(
        "five<|end_of_text|>"
    )
    assert data.train.num_trained == data.train.num_tokens - 1
    assert data.prompts[0].messages == [Message("user", "Add 2 and 3."), Message("assistant", "five")]


def test_a_template_for_plain_texts_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        read([{"text": "a"}], template="alpaca")
    assert str(caught.value).startswith("data.template: 'alpaca', but the data is plain text\n")
    assert "data.template=plain" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "a"}], "data.columns={text: YOUR_COLUMN}"),
        ([{"text": 3}], "field 'text': found 3"),
        ([{"text": "a"}, {"text": None}], "row 2: field 'text': missing or null"),
        ([{"text": "  "}], "no row to train on"),
    ],
)
def test_rows_without_text_are_reported(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(rows)
    assert message in str(caught.value)


def test_a_mixture_of_texts_and_of_task_rows_with_their_prompts(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one\n\ntwo")
    write(tmp_path / "b.jsonl", json.dumps({"body": "three"}) + "\n")
    write(tmp_path / "c.jsonl", json.dumps({"question": "four?", "answer": "five"}) + "\n")
    mix = [
        {"source": str(tmp_path / "a.txt")},
        {"source": str(tmp_path / "b.jsonl"), "columns": {"text": "body"}},
        {"source": str(tmp_path / "c.jsonl")},
    ]
    data = read(None, mix=mix, separator="\n\n", max_length=500, template="alpaca", packing=True)
    row = data.train[0]
    decode = small_tokenizer("llama3").decode
    texts = [
        decode(part, skip_special_tokens=True)
        for part in torch.split(row["input_ids"], row["document_lengths"])
    ]
    assert sorted(text for text in texts if len(text) < 9) == ["one", "three", "two"]
    [task] = [text for text in texts if len(text) > 9]
    assert task.startswith("Below is an") and task.endswith("four?\n\n### Response:five")
    assert data.report.layout == "text + question/answer; documents: 4 and 0 held out"
    assert [conversation.messages[0].content for conversation in data.prompts] == ["four?"]
    assert [source.num_usable for source in data.report.sources] == [2, 1, 1]


def test_special_tokens_in_a_text_are_escaped_and_reported() -> None:
    data = read([{"text": "it ends<|end_of_text|>here"}])
    assert small_tokenizer("llama3").eos_token_id not in ids(data.train)[:-1]
    assert any("(escaped)" in what for what in data.report.counts)


def test_the_token_cache_serves_every_length(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    first = read(rows, max_length=30)
    again = read(rows, max_length=50, packing=True)
    assert not first.report.from_cache and again.report.from_cache
    assert sorted(ids(first.train)) == sorted(ids(again.train))


def test_rows_have_the_location_of_their_first_document() -> None:
    starts = np.asarray([0, 3, 9, 11], dtype=np.int64)
    arrays = {
        "input_ids": np.arange(11, dtype=np.int32),
        "loss_mask": np.ones(11, dtype=bool),
        "offsets": starts,
    }
    rows = documents_to_rows(TokenizedRows(arrays, ["a", "b", "c"]), 5, packing=False)
    assert rows.locations == ["a", "b"] and rows.lengths == [5, 5]  # the eleventh token is left over
