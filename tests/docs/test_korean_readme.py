"""README.ko.md says what README.md says: the same commands, links and figures; its example is KoAlpaca."""

import re

from test_house import ROOT

ENGLISH, KOREAN = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
EXAMPLES = (("koalpaca", "alpaca"), ("polyglot-ko-5.8b", "llama-3.1-8b"))
"""The Korean page's example, and what the English page has in its place."""
LONGEST = 9 * 1024
"""Bytes of the English page at most: a front page is read, not searched."""
CODE = re.compile(r"^```\w+\n(.*?)^```$", re.M | re.S)


def english_example(text: str) -> str:
    for korean, english in EXAMPLES:
        text = text.replace(korean, english)
    return text


def code_lines(text: str) -> list[str]:
    lines = (line for block in CODE.findall(text) for line in block.splitlines())
    return [english_example(line.split("#")[0].strip()) for line in lines]


def test_code_is_the_same() -> None:
    assert len(code_lines(ENGLISH)) > 15
    assert code_lines(ENGLISH) == code_lines(KOREAN)


def test_inline_code_is_the_same() -> None:
    inline = re.compile(r"`([^`\n]+)`")
    counts = [sorted(map(english_example, inline.findall(CODE.sub("", text)))) for text in (ENGLISH, KOREAN)]
    assert counts[0] == counts[1] and len(counts[0]) > 30


def test_links_are_the_same_and_exist() -> None:
    targets = [re.findall(r"\]\(([^)]+)\)", text) for text in (ENGLISH, KOREAN)]
    english, korean = (sorted(set(names) - {"README.md", "README.ko.md"}) for names in targets)
    assert english == korean and len(english) > 20
    assert not [name for name in english if not (ROOT / name).is_file()]


def test_figures_are_the_same() -> None:
    number = re.compile(r"(?<![\w.])\d+(?:\.\d+)*")
    prose = [CODE.sub("", re.sub(r"`[^`\n]+`|\]\([^)]+\)", "", text)) for text in (ENGLISH, KOREAN)]
    prose[0] = re.sub(r"\b[Tt]wo\b", "2", prose[0])  # Korean writes numbers with a unit as figures
    english, korean = (sorted(number.findall(text)) for text in prose)
    assert english == korean and len(english) > 60


def test_the_front_page_is_short() -> None:
    assert len(ENGLISH.encode()) <= LONGEST


def test_the_tests_that_it_names_exist() -> None:
    sources = "".join(
        file.read_text(encoding="utf-8") for file in sorted((ROOT / "tests").rglob("test_*.py"))
    )
    named = set(re.findall(r"`(test_\w+)`", ENGLISH))
    assert len(named) >= 5 and all(f"def {name}(" in sources for name in named)
