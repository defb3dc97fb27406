"""Rows given in Python: what is taken, how it is stored, and what is refused."""

import copy
import datetime
import decimal
import gc
import pickle
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest

from finetune.data.files import data_fingerprint, source_fingerprint
from finetune.data.sources import iter_source
from finetune.recipe.errors import UserError
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.recipe import read_recipe
from finetune.recipe.settings import DataSettings

ROWS = [{"b": "한국어", "a": 1.5, "c": None}, {"b": "x\u2028y\n", "a": None, "c": None}]


class Stream:
    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return table().__arrow_c_stream__(requested_schema)


def table() -> pyarrow.Table:
    return pyarrow.Table.from_pylist(ROWS)


def generator() -> Iterator[dict[str, Any]]:
    yield from ROWS


TABLES: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": generator,
    "other order of columns": lambda: [dict(sorted(row.items())) for row in ROWS],
    "pandas": lambda: pandas.DataFrame(ROWS),
    "pandas, other order of columns": lambda: pandas.DataFrame(ROWS)[["c", "a", "b"]],
    "pandas, nullable types": lambda: pandas.DataFrame(ROWS).convert_dtypes(),
    "pandas, other index": lambda: pandas.DataFrame(ROWS, index=[7, 3]),
    "records of pandas": lambda: pandas.DataFrame(ROWS).convert_dtypes().to_dict("records"),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "Dataset formatted as arrays": lambda: datasets.Dataset.from_list(ROWS).with_format("numpy"),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "Table": table,
    "RecordBatch": lambda: pyarrow.RecordBatch.from_pylist(ROWS),
    "RecordBatchReader": lambda: table().to_reader(),
    "another library's Arrow table": Stream,
}


@pytest.mark.parametrize("name", TABLES)
def test_equal_rows_are_equal_whatever_their_table(name: str) -> None:
    rows = PythonRows.of(TABLES[name]())
    assert rows == PythonRows.of(ROWS) != PythonRows.of(ROWS[::-1])
    assert list(rows) == ROWS and rows.num_rows == 2 and rows.num_bytes == rows.path.stat().st_size


VALUES = [
    (2**80, 2**80),
    (np.int64(3), 3),
    (np.float32(0.5), 0.5),
    (np.bool_(True), True),
    (np.array([[1, 2]]), [[1, 2]]),
    (np.datetime64("2020-01-02"), "2020-01-02"),
    (datetime.datetime(2020, 1, 2, 3), "2020-01-02T03:00:00"),
    (pandas.Timestamp("2020-01-02"), "2020-01-02T00:00:00"),
    (datetime.timedelta(seconds=5), "0:00:05"),
    (decimal.Decimal("1.20"), "1.20"),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ((1, ("a",)), [1, ["a"]]),
    ({"z": 1, "a": [None, {"b": ""}]}, {"z": 1, "a": [None, {"b": ""}]}),
    (float("nan"), None),
    ([float("nan"), pandas.NaT, pandas.NA], [None, None, None]),
    ("\ud83d", "\ud83d"),
]


@pytest.mark.parametrize(("value", "stored"), VALUES, ids=[repr(value)[:30] for value, _ in VALUES])
def test_values_are_stored_as_json(value: Any, stored: Any) -> None:
    [row] = PythonRows.of([{"a": value}])
    assert row == {"a": stored} and repr(row["a"]) == repr(stored)


def failing() -> Iterator[dict[str, Any]]:
    yield {"a": 1}
    raise ConnectionError("gone")


nested: list[Any] = []
nested.append(nested)
REFUSED: dict[str, tuple[Any, str, str]] = {
    "columns": ({"a": [1, 2]}, "found dict, not rows", "datasets.Dataset.from_dict"),
    "bytes": (b"x", "found bytes", "a list of dicts"),
    "a set": ({1}, "found set", "a list of dicts"),
    "a function": (generator, "found function, not its result", "call it: data=rows()"),
    "an object": (object(), "found object", "a data frame"),
    "texts": (["a"], "row 1: found 'a'", "[{'text': text} for text in texts]"),
    "an array": (np.arange(3), "row 1: found np.int64(0)", "a dict of named columns"),
    "a series": (pandas.Series(["a"]), "found pandas.Series", "series.to_frame('text')"),
    "an Arrow array": (pyarrow.chunked_array([[1]]), "found ChunkedArray", "an Arrow table"),
    "numbers as names": (pandas.DataFrame([[1]]), "row 1: a column named 0 (int)", "names that are text"),
    "two columns": (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "two columns named 'a'", "unique"),
    "an image": ([{"a": 1}, {"a": b"\x89PNG"}], "row 2: column 'a': found a value of type bytes", "leave"),
    "a set in a list": (
        [{"a": {"b": [{1}]}}],
        "column 'a.b[0]': found a value of type set",
        "column 'a' out",
    ),
    "infinity": ([{"a": [1, float("inf")]}], "row 1: column 'a[1]': found inf", "a finite number"),
    "a long number": ([{"a": 10**5000}], "column 'a': a number of more than 4300 digits", "a shorter number"),
    "a circle": ([{"a": nested}], "row 1: values nested too deeply", "a few levels"),
    "a failing generator": (failing(), "reading row 2 raised ConnectionError: gone", "rows that can be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_is_refused_with_one_problem(name: str) -> None:
    value, actual, repair = REFUSED[name]
    with pytest.raises(UserError) as error:
        read_recipe("sft", "quickstart", shortcuts={"data.source": value, "train.epochs": 0})
    [rows, epochs] = error.value.problems
    assert actual in str(rows) and repair in str(rows) and epochs.where.startswith("train.epochs")


def test_rows_of_other_keys_are_named_by_their_key() -> None:
    settings = {"data.mix": [{"source": "a/b"}, {"source": [{"a": b""}]}], "data.held_out": [7]}
    with pytest.raises(UserError) as error:
        read_recipe("sft", "quickstart", shortcuts=settings)
    places = [problem.where for problem in error.value.problems]
    assert places == ["row 1 of data.mix[1].source: column 'a'", "row 1 of data.held_out"]
    mixed = DataSettings(mix=[{"source": ROWS}], held_out=pandas.DataFrame(ROWS))
    assert mixed.mix and mixed.mix[0].source == mixed.held_out == PythonRows.of(ROWS)
    [first, _] = iter_source(PythonRows.of(ROWS), key="data.held_out")
    assert (first.location, first.columns) == ("row 1 of data.held_out", ROWS[0])


def test_a_dataset_with_splits_is_read_as_a_folder_with_splits() -> None:
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1])
    )
    assert DataSettings(source=splits).source == PythonRows.of(ROWS)
    assert DataSettings(source=splits, split="test").source == PythonRows.of(ROWS[:1])
    mixed = DataSettings(mix=[{"source": splits, "split": "test"}, {"source": splits}]).mix
    assert mixed and [entry.source for entry in mixed] == [PythonRows.of(ROWS[:1]), PythonRows.of(ROWS)]
    for settings, problem in (
        ({"data.source": splits, "data.split": "dev"}, "no split 'dev'\n    expected: one of train, test"),
        ({"data.held_out": splits}, "splits train, test\n    expected: one of its splits"),
    ):
        with pytest.raises(UserError, match=problem):
            read_recipe("sft", "quickstart", shortcuts=settings)


def test_a_snapshot_does_not_follow_its_table() -> None:
    rows = [dict(row) for row in ROWS]
    stored = PythonRows.of(rows)
    rows[0]["b"] = "other"
    rows.append({})
    assert list(stored) == ROWS
    # Other processes read the same file, which goes with the first object.
    sent = pickle.loads(pickle.dumps(stored))
    assert sent == stored and copy.deepcopy(stored) is stored and list(sent) == ROWS
    del stored
    gc.collect()
    assert not sent.path.exists()


def test_the_copy_of_a_run_has_the_fingerprint_of_the_rows(tmp_path: Path) -> None:
    rows = PythonRows.of(ROWS)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(rows.path.read_bytes())
    assert source_fingerprint(rows) == source_fingerprint(str(file)) != source_fingerprint(PythonRows.of([]))
    by_value, by_file = DataSettings(source=ROWS), DataSettings(source=file)
    assert data_fingerprint(by_value) == data_fingerprint(by_file)
    assert [row.columns for row in iter_source(str(file))] == ROWS
