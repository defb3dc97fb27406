"""held_out.jsonl and the places of held-out rows."""

from typing import Any

import pytest

from finetune.recipe.user_arguments import CompletionRow
from finetune.training.held_out_file import compact_locations, graded_entry, write_graded


class Run:
    """A run directory that only has held_out.jsonl."""

    is_writer = True

    def __init__(self) -> None:
        self.files: dict[str, list[dict[str, Any]]] = {}

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        return self.files.get(name, [])

    def write_jsonl(self, name: str, entries: list[dict[str, Any]]) -> None:
        self.files[name] = list(entries)


@pytest.mark.parametrize(
    ("locations", "compact"),
    [
        (["a.csv:4", "a.csv:3", "a.csv:5", "a.csv:9"], {"a.csv": "3-5, 9"}),
        (["b.json:[0]", "b.json:[1]"], {"b.json": "0-1"}),
        (["c.parquet:row 7"], {"c.parquet": "7"}),
        (["owner/name:sub[train] row 12"], {"owner/name:sub[train]": "12"}),
        (["row 3", "row 4", "row 2 of data.held_out"], {"rows": "3-4", "of data.held_out": "2"}),
        (["x/f:2.jsonl:14", "a.csv:1"], {"a.csv": "1", "x/f:2.jsonl": "14"}),
        (["row 3", "row 3"], {"rows": "3"}),
        (["somewhere"], {"somewhere": ""}),
        ([], {}),
    ],
)
def test_places_are_compact(locations: list[str], compact: dict[str, str]) -> None:
    assert compact_locations(locations) == compact


def test_an_evaluation_that_runs_again_replaces_its_entries() -> None:
    run = Run()
    row = CompletionRow("1 + 1?", "2", "2", "a.jsonl:7")
    entry = graded_entry(row, ended_with_eos=True, grades={"right": 1.0})
    write_graded(run, "graders", "before", [entry])  # type: ignore[arg-type]
    write_graded(run, "exact_match", "before", [graded_entry(row, ended_with_eos=True, correct=True)])  # type: ignore[arg-type]
    write_graded(run, "graders", "before", [entry, entry])  # type: ignore[arg-type]
    assert [line["evaluation"] for line in run.files["held_out.jsonl"]] == [
        "exact_match",
        "graders",
        "graders",
    ]
    assert run.files["held_out.jsonl"][1] == {
        "evaluation": "graders",
        "when": "before",
        "location": "a.jsonl:7",
        "prompt": "1 + 1?",
        "expected": "2",
        "completion": "2",
        "ended_with_eos": True,
        "grades": {"right": 1.0},
    }
