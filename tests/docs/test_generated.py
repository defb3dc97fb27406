"""The generated parts of the pages equal what the code says."""

import re
from pathlib import Path

import pytest
from test_house import ROOT

from tools.docs.blocks import BLOCK, BLOCKS, ELSEWHERE, pages, render_page
from tools.docs.keys import values_text
from tools.docs.markdown import table

PAGES = [str(page.relative_to(ROOT)) for page in pages()]


@pytest.mark.parametrize("page", PAGES)
def test_page_is_up_to_date(page: str) -> None:
    text = Path(ROOT, page).read_text(encoding="utf-8")
    assert render_page(text) == text, "python -m tools.docs"


@pytest.mark.parametrize("page", PAGES)
def test_every_part_is_closed(page: str) -> None:
    text = Path(ROOT, page).read_text(encoding="utf-8")
    assert text.count("<!-- generated: ") == text.count("<!-- end -->") == len(BLOCK.findall(text))


def test_every_line_of_a_check_is_explained() -> None:
    # The name is the first argument of the result, as text or as a constant of the module.
    result = re.compile(r'\b(?:CheckResult|failed|_check_agreement)\(\s*("[^"]+"|[A-Z_]+)')
    constant = re.compile(r'^([A-Z_]+) = ("[^"]+")$', re.M)
    names = set()
    for file in [*ROOT.glob("align/**/*.py"), *ROOT.glob("finetune/**/*.py")]:
        text = file.read_text(encoding="utf-8")
        constants = dict(constant.findall(text))
        names |= {constants.get(name, name).strip('"') for name in result.findall(text)}
    page = Path(ROOT, "docs/guarantees.md").read_text(encoding="utf-8")
    assert not [name for name in sorted(names) if f"| `{name}` |" not in page] and len(names) > 15


def test_every_generator_is_used() -> None:
    used = {match["call"].split()[0] for page in pages() for match in BLOCK.finditer(page.read_text("utf-8"))}
    assert used == {*BLOCKS, *ELSEWHERE}


def test_an_edited_part_is_written_anew() -> None:
    page = "before\n<!-- generated: exit-status -->\n| edited |\n<!-- end -->\nafter\n"
    rendered = render_page(page)
    assert "edited" not in rendered and "| 130 | interrupted" in rendered
    assert rendered.startswith("before\n<!--") and rendered.endswith("<!-- end -->\nafter\n")


def test_values_of_a_key() -> None:
    assert values_text(int | None) == "integer, `null`"
    assert values_text(list[str] | str) == "list, text"


def test_braces_of_a_cell_are_code() -> None:
    # Markdown's attribute lists would take them at the end of a cell.
    cell = "a loss, or {name: ipo}; `{kept: as it is}`"
    assert table(["meaning"], [[cell]]).endswith("| a loss, or `{name: ipo}`; `{kept: as it is}` |\n")
