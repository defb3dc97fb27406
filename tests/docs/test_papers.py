"""The page on papers and their code names tests that exist."""

import ast
import re

from test_house import ROOT, tree

PAGE = (ROOT / "docs" / "reference" / "papers.md").read_text(encoding="utf-8")


def test_each_row_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "arxiv.org" in line]
    named = [re.findall(r"`(test_\w+)` \|$", row) for row in rows]
    tests = {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(rows) >= 15 and all(len(names) == 1 for names in named)
    assert {name for names in named for name in names} - tests == set()
