"""Cache of tokens: one process tokenizes while the others wait; a second start reads no row."""

import json
import os
import threading

import numpy as np
import pytest
from small_tokenizers import tokenizer

from finetune.data import cache, mapped_cache, pipeline
from finetune.data.dataset import prepare_conversations
from finetune.data.mapped_cache import read_mapped, write_mapped
from finetune.data.row_store import TextColumn
from finetune.data.tokens import Encoder
from finetune.recipe.settings import DataSettings


@pytest.fixture(autouse=True)
def _isolated_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prepare(path, **data):
    settings = DataSettings(source=str(path), template="chatml", **data)
    return prepare_conversations(settings, Encoder(tokenizer("gpt2"), "chatml"), max_length=64, seed=0)


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"say {number}", "output": "12 " * number} for number in range(1, 31)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def contents(data):
    """Return everything of prepared data that does not say whether it is from the cache."""
    splits = [data.train, *([data.held_out] if data.held_out else [])]
    arrays = [{name: values.tolist() for name, values in rows.arrays.items()} for rows in splits]
    locations = [[list(rows.locations), rows.source_ids.tolist()] for rows in splits]
    report = vars(data.report) | {
        "from_cache": None,
        "sources": [vars(source) for source in data.report.sources],
    }
    return arrays, locations, list(data.prompts), report


@pytest.mark.parametrize("held_out", [0, 5])
def test_cached_data_is_what_was_prepared(rows_file, held_out):
    without, first, second = (
        prepare(rows_file, held_out=held_out, cache=cache) for cache in (False, True, True)
    )
    assert (first.report.from_cache, second.report.from_cache) == (False, True)
    assert contents(without) == contents(first) == contents(second)
    assert isinstance(second.train.arrays["input_ids"], np.memmap), "mapped, not read into memory"
    assert second.report.num_too_long > 0, "counts of truncation are cached too"


def test_pain_22_a_second_start_reads_no_row(rows_file, monkeypatch):
    first = prepare(rows_file)
    monkeypatch.setattr(pipeline, "load_rows", None)
    assert contents(prepare(rows_file)) == contents(first)


@pytest.mark.parametrize("change", ["content", "setting", "name", "seed_of_text"])
def test_a_change_of_anything_is_another_entry(rows_file, change):
    prepare(rows_file)
    options = {}
    if change == "content":
        rows_file.write_text(rows_file.read_text().replace("say 3", "say 9"))
    elif change == "setting":
        options = {"held_out": 2}
    elif change == "seed_of_text":
        options = {"system_prompt": None, "loss_on": "all"}
    else:
        rows_file = rows_file.rename(rows_file.with_name("other.jsonl"))
    data = prepare(rows_file, **options)
    assert not data.report.from_cache
    assert data.train.locations[0].startswith(str(rows_file))


def test_pain_22_concurrent_processes_tokenize_rows_once(rows_file, monkeypatch):
    built = []
    load_rows = pipeline.load_rows

    def counted(*arguments):
        built.append(threading.get_ident())
        return load_rows(*arguments)

    monkeypatch.setattr(pipeline, "load_rows", counted)
    reports = []
    threads = [threading.Thread(target=lambda: reports.append(prepare(rows_file).report)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert sorted(report.from_cache for report in reports) == [False, True, True, True]


@pytest.mark.parametrize("chunk", [32 << 20, 256])  # one chunk of the array, and 16
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "notes"])
def test_pain_22_a_damaged_entry_is_written_anew(tmp_path, monkeypatch, damage, chunk):
    monkeypatch.setattr(mapped_cache, "CHUNK_BYTES", chunk)
    path = tmp_path / "tokens" / "key"
    arrays = {"ids": np.arange(1000, dtype=np.int32), "empty": np.zeros(0, bool)}
    write_mapped(path, arrays, {"rows": 3})
    read, notes = read_mapped(path)
    assert notes == {"rows": 3} and all(np.array_equal(read[name], arrays[name]) for name in arrays)
    file = path / ("notes.json" if damage == "notes" else "ids.npy")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage != "flipped" else content[:-9] + b"\xff" + content[-8:])
    assert read_mapped(path) is None
    # What a killed process with the same number has left.
    path.with_name(f"key.{os.getpid()}.partial").mkdir()
    write_mapped(path, arrays, {})
    assert read_mapped(path) is not None


def test_the_lock_file_is_outside_the_cache_folder_and_released():
    path = cache.cache_path("tokens", "other")
    with cache.cache_lock(path):
        assert not path.exists()
    with cache.cache_lock(path):
        assert [file.name for file in path.parents[1].iterdir()] == ["locks"]


def test_texts_of_any_file_name_are_kept():
    names = ["a.jsonl:1", "", "caf\udce9.jsonl:2", "더하기"]
    assert TextColumn.of(names) == names
