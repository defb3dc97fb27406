"""Files as they are on disks: splits, separators, encodings, compression, pointers, limits of the decoder."""

import json
from pathlib import Path

import datasets
import pyarrow
import pytest

from finetune.data.files import data_fingerprint, source_fingerprint, split_of
from finetune.data.sources import iter_source, read_source
from finetune.recipe.errors import UserError
from finetune.recipe.settings import DataSettings, DocumentSettings

ROWS = [{"instruction": "add", "output": "5"}, {"instruction": "더하기", "output": "오, 네; 다섯"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(separator, quote='"'):
    """Return the rows as text with a separator."""
    cells = [["instruction", "output"], *([row["instruction"], row["output"]] for row in ROWS)]
    return "\n".join(separator.join(f"{quote}{cell}{quote}" for cell in line) for line in cells) + "\n"


def read(source, **options):
    """Return the columns of a source's rows, and the notes on what was detected."""
    notes = []
    rows = [row.columns for row in iter_source(str(source), note=notes.append, **options)]
    return rows, notes


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.ndjson", LINES.encode(), None),
        ("a.csv", table(";").encode(), "a.csv: fields are separated by semicolons"),
        ("a.csv", table("\t").encode(), "a.csv: fields are separated by tabs"),
        ("a.csv", table("|", quote="").encode(), "a.csv: fields are separated by vertical bars"),
        ("a.tsv", table(",").encode(), "a.tsv: fields are separated by commas"),
        ("a.csv", table(",").encode(), None),
        ("a.csv", table(",").encode("utf-16"), "a.csv: read as UTF-16"),
        ("a.jsonl", LINES.encode("utf-16-be").join([b"\xfe\xff", b""]), "a.jsonl: read as UTF-16"),
        ("a.jsonl", LINES.encode("cp949"), "a.jsonl: read as cp949"),
        ("a.csv", table(";").encode("cp949"), "a.csv: read as cp949"),
        ("a.jsonl.zst", pyarrow.compress(LINES.encode(), "zstd", asbytes=True), None),
        ("a.json.zst", pyarrow.compress(json.dumps(ROWS).encode(), "zstd", asbytes=True), None),
        ("a.TSV.ZST", pyarrow.compress(table("\t").encode(), "zstd", asbytes=True), None),
    ],
)
def test_formats_are_recognized_and_reported(tmp_path, name, content, note):
    (tmp_path / name).write_bytes(content)
    rows, notes = read(tmp_path / name)
    assert rows == ROWS
    assert note is None or note in notes
    assert len(notes) == (note is not None) + (name == "a.csv" and note == "a.csv: read as cp949")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"id": 1}\n{"id": ' + "9" * 5000 + "}\n",
            "a.jsonl:2: a number of more than 4300 digits",
        ),
        ("a.json", '[{"id": ' + "9" * 5000 + "}]", "a.json:[0]: a number of more than 4300 digits"),
        ("a.jsonl", '{"id": ' + "[" * 99999 + "]" * 99999 + "}", "a.jsonl:1: values nested too deeply"),
        ("a.json", '[{"id": ' + "[" * 99999 + "]" * 99999 + "}]", "a.json:[0]: values nested too deeply"),
        ("a.jsonl", "caf\xe9".encode("latin-1"), "a.jsonl: not UTF-8"),
        (
            "a.parquet",
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "a.parquet: a pointer of Git LFS",
        ),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdbroken", "a.jsonl.zst: cannot be read"),
    ],
)
def test_pain_24_what_cannot_be_read_is_one_message(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read_source(str(tmp_path / name))
    assert f"{tmp_path}/{message}" in str(caught.value)


def test_a_truncated_zst_file_is_an_error(tmp_path):
    content = pyarrow.compress(LINES.encode() * 5000, "zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="a complete compressed file"):
        read_source(str(tmp_path / "a.jsonl.zst"))


def folder_of(path, *names):
    """Write a folder with one row per file, whose instruction is the file's name."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"instruction": name, "output": "x"}) + "\n", encoding="utf-8")
    return path


def names_read(source, **options):
    rows, notes = read(source, **options)
    return [row["instruction"] for row in rows], notes


def test_a_folder_gives_the_files_of_one_split(tmp_path):
    folder = folder_of(tmp_path, "train-0.jsonl", "train-1.jsonl", "test.jsonl", "val.jsonl", "more.jsonl")
    folder_of(tmp_path, "._train-0.jsonl", ".cache/train.jsonl")
    used, [note] = names_read(folder)
    assert used == ["more.jsonl", "train-0.jsonl", "train-1.jsonl"]
    assert note == "not used, as their names say another split than 'train': test.jsonl, val.jsonl"
    assert names_read(folder, split="validation")[0] == ["more.jsonl", "val.jsonl"]
    assert source_fingerprint(str(folder)) != source_fingerprint(str(folder), None, "test")
    before = data_fingerprint(DataSettings(source=str(folder)))
    folder_of(tmp_path, "test-2.jsonl")
    assert data_fingerprint(DataSettings(source=str(folder))) == before, "rows that are not used do not count"


def test_a_clone_of_a_hub_dataset_has_its_files_in_data(tmp_path):
    folder = folder_of(tmp_path, "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl")
    (tmp_path / "README.md").write_text("card")
    assert names_read(folder)[0] == ["data/train-00000-of-00001.jsonl"]
    with pytest.raises(UserError, match=r"only files of split test(.|\n)*data\.split=test"):
        read_source(str(folder_of(tmp_path / "other", "test.jsonl")))


def test_documents_keep_every_name(tmp_path):
    (tmp_path / "test-plan.md").write_text("A plan.")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "report.txt").write_text("A report.")
    settings = DocumentSettings(source=str(tmp_path))
    rows, notes = read(tmp_path, text_format=settings.text_format)
    assert [row["text"] for row in rows] == ["A report.", "A plan."] and notes == []


def test_saved_datasets_are_read(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "splits")
    rows = list(iter_source(str(tmp_path / "one")))
    assert [row.columns for row in rows] == ROWS and rows[1].location == f"{tmp_path}/one row 2"
    assert read(tmp_path / "splits", split="test")[0] == ROWS[:1]
    with pytest.raises(UserError, match=r"no split 'dev'(.|\n)*one of test, train"):
        read(tmp_path / "splits", split="dev")
    with pytest.raises(UserError, match="no split 'dev'"):
        source_fingerprint(str(tmp_path / "splits"), None, "dev")
    (folder_of(tmp_path / "plain", "train.jsonl") / "dataset_info.json").write_text("[]")
    assert names_read(tmp_path / "plain")[0] == ["train.jsonl"]
    assert source_fingerprint(str(tmp_path / "one")) != source_fingerprint(
        str(tmp_path / "splits"), None, "test"
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("my-test.csv", "test"),
        ("validation/0.parquet", "validation"),
        ("latest.jsonl", None),
        ("training_data.json.gz", "train"),
        ("contest.json", None),
        ("dev2.jsonl", "validation"),
        ("data.jsonl", None),
    ],
)
def test_names_that_say_a_split(name, split):
    assert split_of(Path(name)) == split


def test_a_large_json_array_is_read_in_pieces(tmp_path):
    rows = [{"instruction": f"{number} " * 40, "output": 'a ] " [ {' * number} for number in range(600)]
    text = json.dumps(rows, indent=1)
    assert len(text) > 2**20, "longer than what is read at a time"
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json")[0] == rows
    (tmp_path / "a.json").write_text(text[:-1] + ",]")
    with pytest.raises(UserError, match=r"a\.json:\d+: "):
        read(tmp_path / "a.json")
