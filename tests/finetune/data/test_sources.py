"""Every file type is read; damage is reported with file, line and repair."""

import gzip
import json
import re

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from finetune.data.files import source_fingerprint
from finetune.data.sources import read_source
from finetune.recipe.errors import UserError
from finetune.recipe.python_rows import PythonRows, RowsError

ROWS = [{"instruction": "add", "output": "5"}, {"instruction": "더하기", "output": 'say "hi",\nplease'}]
CSV = 'instruction,output\nadd,5\n더하기,"say ""hi"",\nplease"\n'
TSV = 'instruction\toutput\nadd\t5\n더하기\t"say ""hi"",\nplease"\n'


def write(path, content):
    """Write text or bytes, compressed if the name ends in .gz; return the path as text."""
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.name.lower().endswith(".gz") else data)
    return str(path)


def write_parquet(path, rows):
    """Write rows as Parquet."""
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def lines(rows):
    """Return rows as JSON lines."""
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def error_message(source):
    """Return the message of the error that reading raises."""
    with pytest.raises(UserError) as caught:
        read_source(source)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl.gz", lines(ROWS) + "\n"),
        ("A.JSONL.GZ", lines(ROWS)),
        ("a.jsonl", "\n" + lines(ROWS) + "\n\n  \n"),
        ("a.jsonl", lines(ROWS).replace("\n", "\r\n")),
        ("a.csv", CSV),
        ("a.csv.gz", CSV),
        ("a.tsv", TSV),
        ("a.json", "\ufeff" + json.dumps(ROWS)),
        ("a.jsonl", "\ufeff" + lines(ROWS)),
        ("a.csv", "\ufeff" + CSV),
    ],
)
def test_every_suffix_gives_the_same_rows(tmp_path, name, content):
    source = read_source(write(tmp_path / name, content))
    assert [row.columns for row in source] == ROWS


def test_parquet_is_read(tmp_path):
    source = read_source(write_parquet(tmp_path / "a.parquet", ROWS))
    assert [(row.columns, row.location) for row in source] == [
        (ROWS[0], f"{tmp_path}/a.parquet:row 1"),
        (ROWS[1], f"{tmp_path}/a.parquet:row 2"),
    ]


def test_a_python_list_is_a_source():
    source = read_source(PythonRows.of(ROWS))
    assert [row.columns for row in source] == ROWS
    assert [row.location for row in source] == ["row 1", "row 2"]
    with pytest.raises(RowsError, match="found 7") as error:
        PythonRows.of([{"a": 1}, 7])
    assert error.value.row == 2


def test_a_folder_is_read_in_order_of_names_and_other_files_are_left_alone(tmp_path):
    write(tmp_path / "b.jsonl", lines(ROWS[1:]))
    write(tmp_path / "a.jsonl.gz", lines(ROWS[:1]))
    write(tmp_path / "README.md", "not data")
    (tmp_path / "c.jsonl").mkdir()
    assert [row.columns for row in read_source(str(tmp_path))] == ROWS


def test_rows_have_locations(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n" + lines(ROWS))
    assert [row.location for row in read_source(path)] == [f"{path}:2", f"{path}:3"]
    path = write(tmp_path / "a.json", json.dumps(ROWS))
    assert [row.location for row in read_source(path)] == [f"{path}:[0]", f"{path}:[1]"]
    # The second row's text holds a line feed; the third begins a line further down.
    path = write(tmp_path / "a.csv", CSV + "sub,1\n")
    assert [row.location for row in read_source(path)] == [f"{path}:2", f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n{"a": \n{"a": 3}',
            r"a\.jsonl:2: Expecting value at column 7: .*one JSON object per line",
        ),
        ("a.jsonl", '{"a": 1}\n[1]', r"a\.jsonl:2: found '\[1\]'.*a JSON object with named columns"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json:2: Expecting ':' delimiter at column"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"a\.json:2: Extra data.*rename it to \.jsonl"),
        ("a.json", '{"a": 1}', r"a\.json: a JSON dict.*expected: a JSON array of objects"),
        ("a.json", "[1]", r"a\.json:\[0\]: found '1'"),
        (
            "a.csv",
            "a,b\n1,2\n1,2,3\n",
            r"a\.csv:3: the number of fields differs from the header \(2\).*columns a, b",
        ),
        ("a.csv", "a,b\n1,2\n\n1\n", r"a\.csv:.*the number of fields differs from the header \(2\)"),
        ("a.csv", 'a,b\n1,"2"x\n', r"a\.csv:2: .*double the quotes inside a quoted field"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv:1: duplicate column 'a' in the header"),
        ("a.jsonl", b'{"a": "\xe9t\xe9"}', r"a\.jsonl: not UTF-8: .*invalid.*iconv -f ENCODING"),
        ("a.txt", "text", r"a\.txt: unknown file type.*\.json.*\.parquet"),
        ("a.parquet", "PAR1 no", r"a\.parquet: .*expected: a Parquet file"),
        ("a.json", "", r"a\.json:1: Expecting value"),
        ("a.jsonl", "", r"a\.jsonl: no rows.*at least one row"),
        ("a.csv", "", r"a\.csv: no rows"),
        ("a.csv", "a,b\n", r"a\.csv: no rows"),
        ("a.json", "[]", r"a\.json: no rows"),
    ],
)
def test_pain_24_damage_is_reported_with_its_location(tmp_path, name, content, message):
    error = error_message(write(tmp_path / name, content))
    assert re.search(message, error, re.DOTALL), error
    assert "Traceback" not in error


@pytest.mark.parametrize("damage", ["cut", "bits", "plain"])
def test_a_corrupt_gzip_file_is_an_error(tmp_path, damage):
    full = gzip.compress(lines(ROWS * 200).encode())
    middle = len(full) // 2
    broken = {
        "cut": full[:middle],
        "bits": full[:middle] + bytes(byte ^ 255 for byte in full[middle:-8]) + full[-8:],
        "plain": lines(ROWS).encode(),
    }
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(broken[damage])
    error = error_message(str(path))
    assert f"{path}: cannot be read: " in error
    assert "expected: a complete compressed file" in error


def test_a_truncated_parquet_file_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: " in error_message(str(path))


def test_a_folder_without_data_is_an_error(tmp_path):
    (tmp_path / "inner").mkdir()
    assert "a folder without data files" in error_message(str(tmp_path))


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "~/no/such/folder"])
def test_a_missing_file_is_never_looked_for_on_the_hub(name):
    assert error_message(name).startswith(f"{name}: no such file or folder")


@pytest.mark.parametrize(
    ("name", "requested"),
    [("owner/name", ("owner/name", None)), ("openai/gsm8k:main", ("openai/gsm8k", "main"))],
)
def test_a_subset_of_a_hub_dataset_follows_a_colon(monkeypatch, name, requested):
    calls = []

    def load_dataset(repository, subset, **options):
        calls.append((repository, subset))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("finetune.data.sources.reach_hub", lambda repository: True)
    assert read_source(name)[0].location == f"{name}[train] row 1"
    assert calls == [requested]


def test_pain_22_fingerprints_follow_the_content(tmp_path):
    one = write(tmp_path / "one.jsonl", lines(ROWS))
    same = write(tmp_path / "two.jsonl", lines(ROWS))
    other = write(tmp_path / "three.jsonl", lines(ROWS) + "\n" + lines(ROWS))
    assert source_fingerprint(one) == source_fingerprint(same)
    rows = PythonRows.of(ROWS[:1])
    stored = write(tmp_path / "stored.jsonl", rows.path.read_text())
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", lines(ROWS))
    before = source_fingerprint(str(folder))
    write(folder / "b.jsonl", lines(ROWS))
    digests = [
        source_fingerprint(one),
        source_fingerprint(other),
        source_fingerprint(str(folder)),
        source_fingerprint(PythonRows.of(ROWS[:1])),
        source_fingerprint("owner/name"),
        source_fingerprint("owner/name", "abc"),
        source_fingerprint("owner/other"),
        source_fingerprint(None),
    ]
    assert before != source_fingerprint(str(folder))
    assert len(set(digests)) == len(digests)
    assert source_fingerprint(PythonRows.of(ROWS[:1])) == source_fingerprint(stored)
    write(tmp_path / "one.jsonl", lines(ROWS[:1]))
    assert source_fingerprint(one) != digests[0]
