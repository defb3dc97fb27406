"""The output of `generate`: resumed after a kill, finished once, and never overwritten by another command."""

import csv
import json
from pathlib import Path

import pytest

from align.generation.output_file import OutputFile
from finetune.recipe.errors import UserError

FACTS = {"model": {"run": "sft-a"}, "data": "d1", "choices": ["a", "b"]}
RESULTS = [{"label": "a"}, {"label": "b"}, {"label": "a"}]


def output(tmp_path: Path, name: str = "out.jsonl", **changed: object) -> OutputFile:
    return OutputFile(tmp_path / name, {**FACTS, **changed})


def test_results_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    file = output(tmp_path)
    assert file.results() == []
    file.append(RESULTS[:2])
    with file.partial.open("ab") as stream:
        stream.write(b'{"label": "a\xec')  # half of a line, and of a character
    assert output(tmp_path).results() == RESULTS[:2]
    output(tmp_path).append(RESULTS[2:])
    assert output(tmp_path).results() == RESULTS
    assert not file.path.exists() and output(tmp_path).finished() is None


def test_a_kill_before_the_first_line_is_complete(tmp_path: Path) -> None:
    file = output(tmp_path)
    file.partial.write_bytes(b'{"model": ')
    assert file.results() == []
    file.append(RESULTS)
    assert output(tmp_path).results() == RESULTS


def test_a_command_that_failed_before_its_first_rows_does_not_block_another(tmp_path: Path) -> None:
    assert output(tmp_path).results() == []
    other = output(tmp_path, choices=["a", "c"])
    assert other.results() == []
    other.append(RESULTS)
    assert output(tmp_path, choices=["a", "c"]).results() == RESULTS


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\r", "\x0b", "\x1c"])
def test_line_separators_in_texts_are_no_ends_of_lines(tmp_path: Path, separator: str) -> None:
    file = output(tmp_path)
    file.results()
    file.append([{"completion": f"a{separator}b"}])
    assert output(tmp_path).results() == [{"completion": f"a{separator}b"}]


def test_a_finished_output_has_rows_and_record(tmp_path: Path) -> None:
    file = output(tmp_path)
    file.results()
    file.append(RESULTS)
    file.finish([{"text": "가", **row} for row in RESULTS], {"rows": 3, "metrics": {}})
    assert file.path.read_text(encoding="utf-8").splitlines()[0] == '{"text": "가", "label": "a"}'
    record = output(tmp_path).finished()
    assert record == {"rows": 3, "metrics": {}, "facts": FACTS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.json"]


@pytest.mark.parametrize(("name", "separator"), [("out.csv", ","), ("out.TSV", "\t")])
def test_csv_has_all_columns_and_json_in_cells(tmp_path: Path, name: str, separator: str) -> None:
    file = output(tmp_path, name)
    rows = [{"text": 'a "b"\nc', "n": 1}, {"text": "d", "extra": None, "probabilities": {"a": 0.5}}]
    file.finish(rows, {})
    with file.path.open(encoding="utf-8", newline="") as stream:
        [header, first, second] = csv.reader(stream, delimiter=separator)
    assert header == ["text", "n", "extra", "probabilities"]
    assert first == ['a "b"\nc', "1", "", ""] and json.loads(second[3]) == {"a": 0.5}


def test_another_command_is_refused_with_what_differs(tmp_path: Path) -> None:
    file = output(tmp_path)
    file.results()
    file.append(RESULTS)
    with pytest.raises(UserError, match=r'out.jsonl: results of another command: choices \["a", "b"\] there'):
        output(tmp_path, choices=["a", "c"]).results()
    file.finish(RESULTS, {})
    with pytest.raises(UserError, match=r'model {"run": "sft-a"} there, {"run": "sft-b"} now'):
        output(tmp_path, model={"run": "sft-b"}).finished()
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="a file that `generate` did not write"):
        output(tmp_path, "other.jsonl").finished()
    file.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="another process writes it")
    with output(tmp_path).locked(), refused, output(tmp_path).locked():
        raise AssertionError("both have the lock")
    assert list(tmp_path.iterdir()) == []


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out.parquet: unknown file type\n    expected: .*\.csv"):
        output(tmp_path, "out.parquet")
    with pytest.raises(UserError, match="no such folder"):
        output(tmp_path, "none/out.csv")
