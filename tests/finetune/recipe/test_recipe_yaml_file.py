"""Read and write YAML 1.2; format values for messages."""

import pytest

from finetune.recipe import yaml_file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1e5", 1e5),
        (".5", 0.5),
        ("3", 3),
        ("010", 10),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("~", None),
        ("", None),
        ("[a, 2]", ["a", 2]),
        ("{a: 1}", {"a": 1}),
        ("'3'", "3"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("[a", "[a"),
        ("2023-08-25", "2023-08-25"),
    ],
)
def test_scalars(text, value):
    actual = yaml_file.parse_scalar(text)
    assert actual == value and type(actual) is type(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing (null)"),
        (True, "true"),
        (False, "false"),
        (3, "3"),
        ("a", "'a'"),
        ("x" * 99, "'" + "x" * 56 + "..."),
    ],
)
def test_format_value(value, text):
    assert yaml_file.format_value(value) == text


def test_lines_and_plain_types(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# remark\na: &x {b: 1, c: &t true}\n\nd:\n  e: [2023-08-25, *t]\n  <<: *x\n")
    content, lines = yaml_file.read_yaml(path)
    assert content == {"a": {"b": 1, "c": True}, "d": {"e": ["2023-08-25", True], "b": 1, "c": True}}
    assert type(content["d"]) is dict and type(content["d"]["e"]) is list and content["a"]["c"] is True
    assert (lines["a",], lines["a", "b"], lines["d",], lines["d", "e"]) == (2, 2, 4, 5)
    assert set(lines) == {("a",), ("a", "b"), ("a", "c"), ("d",), ("d", "e"), ("d", "b"), ("d", "c")}


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        "no",
        "2e-4",
        "",
        2e-5,
        1e-300,
        3,
        [0.9, 0.999],
        [],
        {},
        {"a": "b: c"},
        "x # y",
        "한국어",
        "a\nb",
    ],
)
def test_round_trip(tmp_path, value):
    path = tmp_path / "a.yaml"
    path.write_text(
        yaml_file.dump_yaml({"description": "d", "s": {"k": value, "l": 1}}, {("s", "l"): "why"}),
        encoding="utf-8",
    )
    content, _ = yaml_file.read_yaml(path)
    assert content["s"] == {"k": value, "l": 1}
    assert "# why" in path.read_text(encoding="utf-8")


def test_invalid_utf8(tmp_path):
    from finetune.recipe.errors import UserError

    (tmp_path / "a.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(UserError, match=r"a\.yaml: .*can't decode byte 0xff") as caught:
        yaml_file.read_yaml(tmp_path / "a.yaml")
    assert "expected: a readable YAML file in UTF-8" in str(caught.value)
