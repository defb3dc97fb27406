"""From a data section to tokenized rows: held-out split, dropped rows, data report, cache."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from platformdirs import user_cache_path
from transformers import AutoTokenizer

from data_templates.segments import Message
from finetune.data.dataset import PreparedData, prepare_conversations
from finetune.data.files import data_fingerprint
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.settings import DataSettings

Write = Callable[..., str]


@pytest.fixture(scope="module")
def encoder(base_folder: Path) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(base_folder), "alpaca")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache_path("llm-align") / "tokens"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def lines(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return lines


def row(question: str, answer: str = "an answer") -> dict[str, str]:
    return {"instruction": question, "output": answer}


def numbered(count: int) -> list[dict[str, str]]:
    return [row(f"Question {i}", f"{i}") for i in range(count)]


def read(
    encoder: Encoder, source: Any, *, max_length: int = 200, seed: int = 0, **settings: Any
) -> PreparedData:
    data = DataSettings(**{"source": source, **settings})
    return prepare_conversations(data, encoder, max_length=max_length, seed=seed)


def texts(encoder: Encoder, rows: Any) -> list[str]:
    return [encoder.tokenizer.decode(rows[index]["input_ids"]) for index in range(len(rows))]


@pytest.mark.parametrize(("held_out", "count"), [(5, 5), (0.25, 5), (0.01, 1), (19, 19)])
def test_held_out_rows_are_disjoint_from_training_rows(
    encoder: Encoder, write: Write, held_out: float, count: int
) -> None:
    path = write(*numbered(20))
    data = read(encoder, path, held_out=held_out)
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out), data.report.held_out) == (20 - count, count, count)
    assert set(data.train.locations).isdisjoint(data.held_out.locations)
    assert set(data.train.locations) | set(data.held_out.locations) == {f"{path}:{i}" for i in range(1, 21)}
    assert [conversation.location for conversation in data.prompts] == data.held_out.locations


def test_nothing_held_out(encoder: Encoder, write: Write) -> None:
    data = read(encoder, write(*numbered(100)))
    assert data.held_out is None and data.report.held_out == 0 and len(data.train) == 100
    assert [conversation.location for conversation in data.prompts] == data.train.locations[:64]


def test_the_held_out_split_depends_on_the_seed_only(encoder: Encoder, write: Write) -> None:
    path = write(*numbered(30))
    sampled = {
        seed: tuple(read(encoder, path, held_out=6, seed=seed).held_out.locations) for seed in (0, 1, 2)
    }
    assert len(set(sampled.values())) == 3
    assert sampled[0] == tuple(read(encoder, path, held_out=6, max_length=60, cache=False).held_out.locations)


def test_a_held_out_file(encoder: Encoder, write: Write) -> None:
    other = write(row("Held", "out"), name="other.jsonl")
    data = read(encoder, write(*numbered(3)), held_out=other)
    assert len(data.train) == 3 and data.held_out.locations == [f"{other}:1"]
    assert "Held" in texts(encoder, data.held_out)[0]
    assert data.prompts[0].messages == [Message("user", "Held"), Message("assistant", "out")]


def test_holding_out_all_rows_is_an_error(encoder: Encoder, write: Write) -> None:
    rows = [*numbered(4), row("", "")]
    with pytest.raises(UserError, match=r"data\.held_out: 4 of 4 usable rows\n +expected: fewer rows"):
        read(encoder, write(*rows), held_out=4)


def test_pain_17_truncated_and_dropped_rows_are_counted_with_first_location(
    encoder: Encoder, write: Write
) -> None:
    rows = [
        row("fine"),
        row("", "no question"),
        row("no answer", ""),
        row("fine too"),
        row("  \n", "blank"),
        row("long", "word " * 300),
        row("word " * 300, "never reached"),
        row("holds </s> in its text"),
        row("longer", "word " * 300),
    ]
    path = write(*rows)
    data = read(encoder, path, max_length=120)
    report = data.report
    assert report.counts == {
        "dropped: empty turn": 3,
        "longer than 120 tokens, truncated": 3,
        "dropped: no trained token within the first 120 tokens": 1,
        "contain template markers in their text (escaped)": 1,
    }
    assert {what: int(where.rsplit(":", 1)[1]) for what, where in report.examples.items()} == {
        "dropped: empty turn": 2,
        "longer than 120 tokens, truncated": 6,
        "dropped: no trained token within the first 120 tokens": 7,
        "contain template markers in their text (escaped)": 8,
    }
    assert (report.rows, report.longest) == (5, 120) and len(data.train) == 5
    assert report.tokens == sum(data.train.lengths)
    assert report.trained_tokens == data.train.num_trained > 0
    text = "\n".join(report.lines())
    assert "5 rows (Alpaca), 0 held out" in text and f"(first: {path}:6)" in text


def test_pain_17_dropped_rows_are_counted(encoder: Encoder, write: Write) -> None:
    data = read(encoder, write(row("a"), row("b", "word " * 300)), max_length=120, overflow="drop")
    assert data.report.counts == {"longer than 120 tokens, dropped": 1} and len(data.train) == 1


def test_pain_17_held_out_rows_are_counted_too(encoder: Encoder, write: Write) -> None:
    other = write(row("a"), row("", "x"), row("b", "word " * 300), name="other.jsonl")
    data = read(encoder, write(*numbered(3)), held_out=other, max_length=120, overflow="drop")
    assert data.report.counts == {
        "held out: dropped: empty turn": 1,
        "held out: longer than 120 tokens, dropped": 1,
    }
    assert data.report.examples["held out: dropped: empty turn"] == f"{other}:2"
    assert data.report.held_out == 1 and [conversation.location for conversation in data.prompts] == [
        f"{other}:1"
    ]


def test_conversations_without_a_reply_or_with_an_unanswered_question(encoder: Encoder, write: Write) -> None:
    def turns(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": f"from {role}"} for role in roles]}

    rows = [turns("user"), turns("user", "assistant", "user"), turns("system", "user")]
    data = read(encoder, write(*rows))
    unanswered = "end with a turn that has no reply (not used)"
    assert data.report.counts == {"dropped: no assistant reply": 2, unanswered: 1}
    assert len(data.train) == 1 and texts(encoder, data.train)[0].endswith("from assistant</s>")


def test_rows_that_a_template_cannot_render_are_reported_and_not_sampled(
    encoder: Encoder, write: Write
) -> None:
    two = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    path = write({"messages": two}, {"messages": two[:2]})
    data = read(encoder, path)
    [(what, number)] = data.report.counts.items()
    assert (what, number) == ("dropped: the template cannot render the conversation", 1)
    assert data.report.examples[what].startswith(f"{path}:1: ")
    assert [conversation.location for conversation in data.prompts] == [f"{path}:2"]
    for conversation in data.prompts:
        encoder.encode_prompt(conversation.messages[:-1])


def test_the_first_token_carries_no_loss_and_the_end_does(encoder: Encoder, write: Write) -> None:
    data = read(encoder, write(*numbered(3)))
    for index in range(3):
        example = data.train[index]
        assert example["row"] == index and example["labels"][0] == -100
        assert example["labels"][-1] == example["input_ids"][-1] == encoder.tokenizer.eos_token_id


def test_python_rows_have_locations(encoder: Encoder) -> None:
    data = read(encoder, [row("a"), row("", "x")])
    assert data.train.locations == ["row 1"]
    assert data.report.examples == {"dropped: empty turn": "row 2"}


def test_a_mix_with_caps(encoder: Encoder, write: Write) -> None:
    first = write(*numbered(10), name="first.jsonl")
    second = write(*[{"question": f"q{i}", "answer": "a"} for i in range(6)], name="second.jsonl")
    third = write(*[{"q": "c", "a": "d"}] * 2, name="third.jsonl")
    mix = [
        {"source": first, "rows": 4},
        {"source": second, "rows": 99},
        {"source": third, "columns": {"instruction": "q", "output": "a"}},
    ]
    data = read(encoder, None, mix=mix)
    counts = {
        name: sum(place.startswith(name) for place in data.train.locations) for name in (first, second, third)
    }
    assert counts == {first: 4, second: 6, third: 2}
    assert data.report.layout == "Alpaca + question/answer"
    message = [line for line in data.report.lines() if " requested, " in line]
    assert message[0].startswith("  33.3% requested, 33.3% of rows, ") and len(message) == 3
    assert message[0].endswith(f": 4 from 4 usable rows of {first} (Alpaca)")
    chosen = [place for place in data.train.locations if place.startswith(first)]
    assert len(set(chosen)) == 4
    again = read(encoder, None, mix=mix)
    assert again.train.locations == data.train.locations
    other = read(encoder, None, mix=mix, seed=1)
    assert other.train.locations != data.train.locations


def test_pain_22_cache_false_writes_no_cache(encoder: Encoder, write: Write, cache: Path) -> None:
    path = write(*numbered(8))
    assert not read(encoder, path, cache=False).report.from_cache
    assert not cache.exists()
    read(encoder, path)
    assert not read(encoder, path, cache=False).report.from_cache


def test_pain_22_the_cache_key_depends_on_everything_that_changes_tokens(
    encoder: Encoder, base_folder: Path, write: Write, cache: Path
) -> None:
    path = write(*numbered(8))
    read(encoder, path)

    def read_after(change: Callable[[], PreparedData]) -> tuple[bool, int]:
        """Return whether the cache was read, and how many files were added to it."""
        before = len(list(cache.iterdir()))
        data = change()
        return data.report.from_cache, len(list(cache.iterdir())) - before

    fresh = (False, 1)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert read_after(lambda: read(Encoder(tokenizer, "vicuna"), path)) == fresh
    assert read_after(lambda: read(Encoder(tokenizer, "alpaca", system="Be brief."), path)) == fresh
    assert read_after(lambda: read(encoder, path, max_length=100)) == fresh
    assert read_after(lambda: read(encoder, path, overflow="drop")) == fresh
    assert read_after(lambda: read(encoder, write(*numbered(7), row("other")))) == fresh
    tokenizer.add_tokens(["Question"])
    assert read_after(lambda: read(Encoder(tokenizer, "alpaca"), write(*numbered(8)))) == fresh
    assert read_after(lambda: read(encoder, path)) == (True, 0)


def test_an_unwritable_cache_is_an_error_with_a_repair(
    encoder: Encoder, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write the cache(.|\n)*data\.cache=false"):
        read(encoder, write(*numbered(8)))
    assert len(read(encoder, write(*numbered(8)), cache=False).train) == 8


def test_no_partial_files_remain(encoder: Encoder, write: Write, cache: Path) -> None:
    read(encoder, write(*numbered(8)))
    [entry] = cache.iterdir()
    assert ".partial" not in entry.name and (entry / "notes.json").exists()


def test_the_fingerprint_follows_the_content_not_the_time(write: Write) -> None:
    path = write(*numbered(4))
    first = data_fingerprint(DataSettings(source=path))
    os.utime(path, (1, 1))
    assert data_fingerprint(DataSettings(source=path)) == first
    other = write(row("x"), name="other.jsonl")
    assert data_fingerprint(DataSettings(source=path, held_out=other)) != first
    write(*numbered(5))
    assert data_fingerprint(DataSettings(source=path)) != first
    rows = data_fingerprint(DataSettings(source=numbered(4)))
    assert rows != data_fingerprint(DataSettings(source=numbered(5)))
