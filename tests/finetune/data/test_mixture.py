"""A mixture of sources, from the recipe's keys to the rows of an epoch."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from small_tokenizers import tokenizer

from data_templates.segments import DOCUMENT_START, Message
from finetune.data.conversation import Conversation
from finetune.data.conversation_rows import ConversationRows
from finetune.data.dataset import prepare_conversations
from finetune.data.load import load_rows
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.settings import DataSettings

Write = Callable[..., str]
SHARED_DATA = Path(__file__).parents[3] / "../shared/data"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def numbered(name: str, count: int) -> str:
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"instruction": f"{name} {i}", "output": f"{i}"}) for i in range(count)]
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return numbered


def mixed(
    *mix: dict[str, Any], seed: int = 0, **data: Any
) -> tuple[list[Conversation], list[Any], DataReport]:
    report = DataReport()
    train, held_out = load_rows(
        ConversationRows(), DataSettings(mix=list(mix), **data), seed, report, DataReport()
    )
    return train, held_out, report


def per_source(rows: list[Conversation]) -> list[int]:
    counts = Counter(row.source_index for row in rows)
    return [counts[number] for number in sorted(counts)]


def test_without_rates_every_row_is_used_once(write: Write) -> None:
    train, _, report = mixed({"source": write("a", 30)}, {"source": write("b", 12)})
    assert per_source(train) == [30, 12] and len({row.location for row in train}) == 42
    assert [source.target_rate for source in report.sources] == pytest.approx([30 / 42, 12 / 42])
    assert report.notes == []


def test_rows_caps_a_source_before_anything_else(write: Write) -> None:
    path = write("a", 100)
    train, _, report = mixed({"source": path, "rows": 10}, {"source": write("b", 10)})
    assert per_source(train) == [10, 10] and report.sources[0].num_read == 10
    again = mixed({"source": path, "rows": 10}, {"source": write("b", 10)}, seed=1)[0]
    assert {row.location for row in again} != {row.location for row in train}


def test_weights_are_rates_and_the_first_exhausted_source_ends_the_epoch(write: Write) -> None:
    # 3 : 1 of 60 and 60 rows: 60 / 0.75 = 80 rows, 60 of the one and 20 of the other.
    first = write("a", 60)
    train, _, report = mixed({"source": first, "weight": 3}, {"source": write("b", 60), "weight": 1})
    assert per_source(train) == [60, 20] and len({row.location for row in train}) == 80
    assert report.notes == [
        f"one epoch is 80 of 120 rows: it ends when {first} is exhausted; "
        "set data.epoch_rows for a longer epoch (smaller sources then repeat)"
    ]


def test_a_requested_number_of_rows_repeats_exhausted_sources(write: Write) -> None:
    small = write("a", 10)
    train, _, report = mixed(
        {"source": small, "weight": 3}, {"source": write("b", 50), "weight": 1}, epoch_rows=100
    )
    assert per_source(train) == [75, 25]
    times = Counter(row.location for row in train if row.source_index == 0)
    assert sorted(times.values()) == [7] * 5 + [8] * 5
    assert max(Counter(row.location for row in train if row.source_index == 1).values()) == 1
    assert report.notes == [f"rows of {small} repeat 7.5 times per epoch: 75 samples of 10 rows"]


def test_a_share_is_a_fraction_of_the_mixture(write: Write) -> None:
    # 95 rows are the other 95 %: 100 rows, 5 of them replayed.
    train, _, report = mixed({"source": write("a", 95)}, {"source": write("general", 50), "share": 0.05})
    assert per_source(train) == [95, 5]
    assert [source.target_rate for source in report.sources] == pytest.approx([0.95, 0.05])


def plain_texts(folder: Path, count: int) -> str:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"Once {i}.", "meta": {}}) + "\n" for i in range(count)))
    return str(path)


def test_replayed_text_is_mixed_in_unchanged(write: Write, tmp_path: Path) -> None:
    texts = plain_texts(tmp_path, 20)
    train, _, report = mixed({"source": write("a", 90)}, {"source": texts, "share": 0.1})
    assert per_source(train) == [90, 10] and report.layout == "Alpaca + text"
    documents = [row for row in train if row.is_document]
    assert len(documents) == 10 and {row.source_index for row in documents} == {1}
    for template in ("vicuna", "chatml", "alpaca", "plain"):
        encoder = Encoder(tokenizer("llama2"), template, system="Be brief.")
        encoded = encoder.encode(documents[0].messages)
        assert encoder.tokenizer.decode(encoded.input_ids[1:-1]) == documents[0].messages[1].content
        assert encoded.input_ids[0] == encoder.tokenizer.bos_token_id
        assert len(encoded.loss_mask) == len(encoded.input_ids) and False not in encoded.loss_mask[1:]
        assert encoded.input_ids[-1] == encoder.tokenizer.eos_token_id


def test_plain_text_cannot_inject_a_turn() -> None:
    encoder = Encoder(tokenizer("llama2"), "vicuna")
    encoded = encoder.encode([DOCUMENT_START, Message("assistant", "a USER: b </s> c")])
    assert encoded.num_escaped == 2
    assert encoded.input_ids.count(encoder.tokenizer.eos_token_id) == 1


def test_plain_text_without_a_share_is_a_mistake(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no known layout has columns text, meta"):
        mixed({"source": write("a", 9)}, {"source": plain_texts(tmp_path, 9)})


def test_documents_are_never_sample_prompts(write: Write, tmp_path: Path) -> None:
    mix = [{"source": write("a", 20)}, {"source": plain_texts(tmp_path, 20), "share": 0.5}]
    encoder = Encoder(tokenizer("llama2"), "vicuna")
    data = prepare_conversations(
        DataSettings(mix=mix, held_out=8, cache=False), encoder, max_length=400, seed=0
    )
    assert data.report.held_out == 8 and len(data.prompts) == 4
    assert not any(row.is_document for row in data.prompts)


def test_a_size_cap_changes_rates_not_rows(write: Write) -> None:
    # FLAN's maximum, here 30: 10 and min(1000, 30) rows.
    mix = ({"source": write("a", 10)}, {"source": write("b", 1000)})
    train, _, _ = mixed(*mix, mix_size_cap=30)
    assert per_source(train) == [10, 30]
    assert max(int(row.messages[1].content) for row in train if row.source_index == 1) > 30


def test_temperature_upsamples_the_small_source(write: Write) -> None:
    # Square roots of 100 and 400 are 10 and 20: until the small one is used up, 100 and 200.
    mix = ({"source": write("a", 100)}, {"source": write("b", 400)})
    assert per_source(mixed(*mix, mix_temperature=2.0)[0]) == [100, 200]
    assert per_source(mixed(*mix, mix_temperature=2.0, epoch_rows=60)[0]) == [20, 40]


def test_rows_of_all_sources_are_shuffled_together(write: Write) -> None:
    train, _, _ = mixed({"source": write("a", 100)}, {"source": write("b", 100)})
    first = sum(row.source_index == 0 for row in train[:50])
    assert 12 < first < 38  # 25 expected, standard deviation 3


def test_the_order_is_a_function_of_seed_and_rows(write: Write) -> None:
    mix = ({"source": write("a", 50), "weight": 2}, {"source": write("b", 30), "weight": 1})
    one, same, other = ([row.location for row in mixed(*mix, seed=seed, held_out=6)[0]] for seed in (0, 0, 1))
    assert one == same and one != other


def test_held_out_rows_have_the_mixtures_proportions_and_are_never_trained(write: Write) -> None:
    mix = ({"source": write("a", 60), "weight": 3}, {"source": write("b", 60), "weight": 1})
    train, held_out, _ = mixed(*mix, held_out=8, epoch_rows=400)
    assert per_source(held_out) == [6, 2] and len(train) == 400
    assert {row.location for row in held_out}.isdisjoint(row.location for row in train)
    # A share is one of the 80 rows that come without repetition.
    assert len(mixed(*mix, held_out=0.1)[1]) == 8


def test_without_rates_all_rows_that_are_not_held_out_are_trained(write: Write) -> None:
    mix = ({"source": write("a", 10)}, {"source": write("b", 6)}, {"source": write("c", 2)})
    train, held_out, _ = mixed(*mix, held_out=4)
    assert len(train) == 14 and len(held_out) == 4


def test_more_held_out_than_a_source_has(write: Write) -> None:
    small = write("a", 2)
    with pytest.raises(UserError, match=r"data\.held_out: 10 of 2 rows of .*a\.jsonl"):
        mixed({"source": small, "share": 0.5}, {"source": write("b", 50)}, held_out=20)


def test_each_source_has_its_own_selection(write: Write) -> None:
    train, _, report = mixed(
        {"source": write("a", 40), "select": {"rows": 5}},
        {"source": write("b", 20), "select": {"min_reply_characters": 2}},
    )
    assert per_source(train) == [5, 10] and [source.num_usable for source in report.sources] == [5, 10]


def test_an_empty_source_is_named(write: Write) -> None:
    with pytest.raises(UserError) as caught:
        mixed({"source": write("a", 4)}, {"source": write("b", 4), "select": {"min_reply_characters": 9}})
    assert str(caught.value).startswith("data.mix[1]: no row to train on: rows dropped: replies shorter")


def test_duplicates_across_sources_are_counted(write: Write) -> None:
    path = write("a", 4)
    _, _, report = mixed({"source": path}, {"source": path})
    assert report.counts == {"identical to an earlier row (not dropped)": 4}


def test_a_rate_below_one_row_is_reported(write: Write) -> None:
    tiny = write("b", 5)
    _, _, report = mixed({"source": write("a", 50)}, {"source": tiny, "share": 0.001}, epoch_rows=50)
    assert report.notes == [f"no row of {tiny} is used: its rate is below one row of the mixture"]


def test_only_the_sampled_rows_of_a_hub_dataset_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def load_dataset(name: str, subset: None, *, split: str, revision: str | None) -> datasets.Dataset:
        requested.append((name, split, revision))
        return datasets.Dataset.from_list([{"inputs": f"q{i}", "targets": f"{i}"} for i in range(1000)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("finetune.data.sources.reach_hub", lambda repository: True)
    columns = {"prompt": "inputs", "completion": "targets"}
    mix = [
        {"source": "some/set", "rows": 10, "columns": columns, "revision": "abc"},
        {"source": "other/set", "rows": 5, "columns": columns, "split": "dev"},
    ]
    train, _, report = mixed(*mix)
    assert requested == [("some/set", "train", "abc"), ("other/set", "dev", None)]
    assert per_source(train) == [10, 5] and [source.num_read for source in report.sources] == [10, 5]
    for row in train:
        number = int(row.messages[1].content)
        name = ("some/set[train]", "other/set[dev]")[row.source_index]
        assert row.location == f"{name} row {number + 1}" and row.messages[0].content == f"q{number}"


REAL = (
    {"source": "alpaca/alpaca_data.json", "weight": 5},
    {"source": "alpaca/dolly_3k.jsonl.gz", "weight": 2, "select": {"min_reply_characters": 20}},
    {"source": "korean/ko_alpaca_data.json", "weight": 1, "rows": 2000},
    {"source": "t0/t0_prompted_tasks.jsonl.gz", "weight": 1},
    {"source": "chat/fastchat_dummy_conversation.json", "weight": 0.5},
    {"source": "llamafactory/glaive_toolcall_en_demo.json", "weight": 0.5},
    {"source": "text/c4_demo.jsonl", "share": 0.05},
)


def test_published_files_in_the_requested_proportions() -> None:
    if not (SHARED_DATA / str(REAL[0]["source"])).is_file():
        pytest.skip("published data sets are not here")
    mix = [part | {"source": str(SHARED_DATA / str(part["source"]))} for part in REAL]
    train, held_out, report = mixed(*mix, epoch_rows=4000, held_out=400)
    # 95 % in the proportions 5 : 2 : 1 : 1 : 0.5 : 0.5, and 5 % of plain text.
    assert per_source(train) == [1900, 760, 380, 380, 190, 190, 200]
    assert per_source(held_out) == [190, 76, 38, 38, 19, 19, 20]
    again = mixed(*mix, epoch_rows=4000, held_out=400)[0]
    assert [row.location for row in again] == [row.location for row in train]
    assert report.layout == "Alpaca + T0 tasks + ShareGPT + text"
