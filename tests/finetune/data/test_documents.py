"""Documents for continued pretraining: rows, loss mask, held-out split."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import MAKERS
from small_tokenizers import tokenizer as small_tokenizer

from data_templates._segments import Message
from finetune.data.collate import PackedCollator, PaddedCollator
from finetune.data.dataset import Prepared, TokenizedRows
from finetune.data.documents import in_rows, prepare_documents
from finetune.data.files import data_fingerprint
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.settings import DocumentSettings


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(source: Any, *, max_length: int = 40, kind: str = "llama3", **settings: Any) -> Prepared:
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
def test_documents_stand_end_to_end_with_eos_between(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    data = read([{"text": text} for text in TEXTS], kind=kind)
    expected = []
    for text in TEXTS:
        expected += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert ids(data.train) == expected[: data.train.num_tokens]
    assert len(expected) - data.train.num_tokens in (0, 1)
    assert data.train.lengths[:-1] == [40] * (len(data.train) - 1)


@pytest.mark.parametrize("packing", [False, True])
def test_every_token_is_learnt_but_the_first_of_a_row_or_piece(packing: bool) -> None:
    data = read([{"text": text} for text in TEXTS], packing=packing)
    rows = [data.train[index] for index in range(len(data.train))]
    unlearnt = sum(len(row.get("parts", [0])) for row in rows)
    assert data.report.trained_tokens == data.train.num_tokens - unlearnt
    for row in rows:
        begins = np.cumsum([0, *row.get("parts", [])])[:-1].tolist() if packing else [0]
        learnt = row["labels"] != -100
        assert [index for index, flag in enumerate(learnt.tolist()) if not flag] == begins
        assert torch.equal(row["labels"][learnt], row["input_ids"][learnt])


def test_packed_rows_hold_whole_documents() -> None:
    texts = [f"Document {number}: " + "word " * (number % 5) for number in range(30)]
    tokenizer = small_tokenizer("llama3")
    whole = {(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts}
    data = read([{"text": text} for text in texts], packing=True, max_length=64)
    found = []
    for index in range(len(data.train)):
        row = data.train[index]
        assert len(row["input_ids"]) <= 64 and sum(row["parts"]) == len(row["input_ids"])
        found += [tuple(part.tolist()) for part in torch.split(row["input_ids"], row["parts"])]
    assert sorted(found) == sorted(whole) and len(data.train) < len(texts) / 2


def test_packed_positions_start_anew_at_each_document() -> None:
    data = read([{"text": text} for text in TEXTS[:2]], packing=True, max_length=100)
    [row] = [data.train[index] for index in range(len(data.train))]
    first, second = row["parts"]
    batch = PackedCollator(0)([row])
    assert batch["position_ids"].tolist() == [[*range(first), *range(second)]]
    assert batch["labels"][0, first] == -100
    blocks = read([{"text": text} for text in TEXTS[:2]], max_length=100)
    padded = PaddedCollator(0)([blocks.train[0]])
    assert (
        padded["attention_mask"].all() and padded["labels"][0, first] == blocks.train[0]["input_ids"][first]
    )


def test_text_files_are_cut_at_the_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\none\n\ntwo\r\nlines\n\n\n\nthree\n")
    data = read(path, separator="\n\n", max_length=500)
    text = small_tokenizer("llama3").decode(ids(data.train))
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    assert text == f"{begin}one{end}{begin}two\nlines{end}{begin}three{end}"
    assert "documents: 3 and" in data.report.layout and data.train.places == [f"{path}:2"]


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
    assert [part in text for part in ("from a text", "from a page", "from a row", "hidden")] == [True] * 3 + [
        False
    ]
    write(tmp_path / "corpus" / "deep" / "b.md", "changed")
    assert data_fingerprint(settings) != before


def test_held_out_documents_are_not_learnt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n".join(f"document number {number} ends" for number in range(40)))
    data = read(path, separator="\n", held_out=0.25, packing=True, max_length=64)
    decode = small_tokenizer("llama3").decode
    learnt, held = (decode(ids(rows), skip_special_tokens=True) for rows in (data.train, data.held_out))
    numbers = [[number for number in range(40) if f" {number} ends" in text] for text in (learnt, held)]
    assert len(numbers[1]) == 10 and sorted(numbers[0] + numbers[1]) == list(range(40))
    assert "documents: 30 and 10 held out" in data.report.layout


def test_of_a_single_text_the_end_is_held_out(tmp_path: Path) -> None:
    lines = [f"line {number} of the book" for number in range(400)]
    path = write(tmp_path / "book.txt", "\n".join(lines))
    data = read(path, held_out=0.2, max_length=64)
    decode = small_tokenizer("llama3").decode
    learnt, held = (decode(ids(rows), skip_special_tokens=True) for rows in (data.train, data.held_out))
    cut = len(learnt.split("\n"))
    assert learnt.split("\n")[:3] == lines[:3] and 315 <= cut <= 325
    assert held.startswith(f"line {held.split()[1]} of") and lines[399] in held
    assert data.train.places[0] == data.held_out.places[0] == path
    assert all(talk.messages[0].content in held for talk in data.prompts) and len(data.prompts) > 1
    words = {"line", "of", "the", "book\nline", *map(str, range(400))}
    assert {talk.messages[0].content.split(" ")[0] for talk in data.prompts} <= words
    with pytest.raises(UserError, match=r"data\.held_out: 1 of 1 usable rows"):
        read(path, held_out=1, max_length=64)
    one_line = write(tmp_path / "line.txt", "word " * 100)
    with pytest.raises(UserError, match=r"data\.held_out: the last 20% of \S+ has no complete line"):
        read(one_line, held_out=0.2)


def test_samples_are_starts_of_texts_with_what_follows() -> None:
    text = "In the beginning there was a text that went on and on"
    data = read([{"text": text}, {"text": "word"}])
    [talk] = data.prompts
    question, answer = talk.messages
    assert question.content + answer.content == text
    assert answer.content.startswith(" ") and abs(len(question.content) - len(text) / 2) < 10
    encoder = Encoder(small_tokenizer("llama3"), "plain")
    assert encoder.encode_prompt([question]) == small_tokenizer("llama3")(question.content)["input_ids"]


def test_samples_of_many_texts_and_of_texts_without_blanks() -> None:
    texts = [{"text": f"the text with the number {number}"} for number in range(300)]
    many = read(texts, held_out=290)
    asked = [int(talk.messages[1].content.split()[-1]) for talk in many.prompts]
    assert len(asked) == 64 and asked == sorted(asked) and max(asked) > 200
    [talk] = read([{"text": "那" * 30}]).prompts
    assert [len(message.content) for message in talk.messages] == [15, 15]
    whole = [{"instruction": f"question {number}", "output": "a"} for number in range(100)]
    assert len(read(whole, template="alpaca", held_out=80).prompts) == 80


def test_conversations_are_written_with_the_template_and_learnt_whole() -> None:
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
    ("rows", "told"),
    [
        ([{"body": "a"}], "data.columns={text: YOUR_COLUMN}"),
        ([{"text": 3}], "field 'text': found 3"),
        ([{"text": "a"}, {"text": None}], "row 2: field 'text': missing or null"),
        ([{"text": "  "}], "no row to train on"),
    ],
)
def test_rows_that_hold_no_text_are_told(rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(UserError) as caught:
        read(rows)
    assert told in str(caught.value)


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
    texts = [decode(part, skip_special_tokens=True) for part in torch.split(row["input_ids"], row["parts"])]
    assert sorted(text for text in texts if len(text) < 9) == ["one", "three", "two"]
    [task] = [text for text in texts if len(text) > 9]
    assert task.startswith("Below is an") and task.endswith("four?\n\n### Response:five")
    assert data.report.layout == "text + question/answer; documents: 4 and 0 held out"
    assert [talk.messages[0].content for talk in data.prompts] == ["four?"]
    assert [source.usable for source in data.report.sources] == [2, 1, 1]


def test_special_tokens_in_a_text_are_written_apart_and_told() -> None:
    data = read([{"text": "it ends<|end_of_text|>here"}])
    assert small_tokenizer("llama3").eos_token_id not in ids(data.train)[:-1]
    assert any("(escaped)" in what for what in data.report.counts)


def test_the_token_cache_serves_every_length(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    first = read(rows, max_length=30)
    again = read(rows, max_length=50, packing=True)
    assert not first.report.from_cache and again.report.from_cache
    assert sorted(ids(first.train)) == sorted(ids(again.train))


def test_rows_of_blocks_name_the_document_they_begin_in() -> None:
    starts = np.asarray([0, 3, 9, 11], dtype=np.int64)
    arrays = {
        "input_ids": np.arange(11, dtype=np.int32),
        "trained": np.ones(11, dtype=bool),
        "starts": starts,
    }
    rows = in_rows(TokenizedRows(arrays, ["a", "b", "c"]), 5, packing=False)
    assert rows.places == ["a", "b"] and rows.lengths == [5, 5]  # the eleventh token is left over
