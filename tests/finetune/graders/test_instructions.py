"""IFEval's verifiable instructions: responses that follow each and that do not, and the four accuracies."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.graders._instruction_checks import CHECKS, count_sentences
from finetune.graders.instructions import Options, followed_instructions, instructions

IFEVAL = Path(__file__).parents[3] / "../shared/data/eval/ifeval_input_data.jsonl"
KOREAN = "오늘은 날씨가 맑아서 공원에서 산책을 했습니다."
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "Dogs and CATS", "Dogs only"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat Cats", "cat"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, "cat", "cat Cats"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "A Cat."),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
        "a!",
        "a!!",
    ),
    ("language:response_language", {"language": "ko"}, KOREAN, "The weather is fine today, and we walk."),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "Hi. You!",
        "Dr. Lee is in.",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "two words",
        "one two three",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        'One.\n\n"So," it is',
        "So it is\n\nTwo",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name] at [place]",
        "[name] at (place)",
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP. P. S. more", "Bye\nP.S. more"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\np.s. more", "Bye PS more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "* a\n* b\n* c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* a\n**bold**", "**bold**"),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "Section 1\na\nSection 2\nb",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', '{"a": 1} is JSON'),
    ("detectable_format:title", {}, "<<A poem>>\nlines", "<< >>\nlines"),
    ("combination:two_responses", {}, "one******two", "one******one"),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem."},
        " write a POEM. Here:",
        "Here: Write a poem.",
    ),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, 'Yes. "Is that ALL?"', "Is that all? Yes."),
    ("startend:quotation", {}, ' "quoted" ', '"quoted" text'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "the U.S. ARMY",
        "the Army of US",
    ),
    ("change_case:english_capital", {}, "THE WEATHER IS FINE TODAY AND WE WALK.", "THE WEATHER IS fine"),
    ("change_case:english_lowercase", {}, "the weather is fine today and we walk.", "The weather is fine"),
    ("punctuation:no_comma", {}, "a and b", "a, b"),
]
DETECTED = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")


@pytest.mark.parametrize(("name", "arguments", "followed", "not_followed"), CASES)
def test_instruction(name: str, arguments: dict[str, Any], followed: str, not_followed: str) -> None:
    if name in DETECTED:
        pytest.importorskip("langdetect")
    values = [
        followed_instructions(text, [name], [arguments], loose=False) for text in (followed, not_followed)
    ]
    assert values == [[True], [False]]
    assert followed_instructions("  ", [name], [arguments], loose=True) == [False], "an empty response"


def test_every_instruction_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("It costs $3.50. Why?", 2),
        ('He said: "No." Then left!', 2),
        ("Wait... what?", 1),
        ("1. First. 2. Second.", 2),
        ("See Fig. 2 of J. Smith et al. 2020.", 1),
        ("Yes!! No.", 2),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_levels_and_variants() -> None:
    ids = ["en:punctuation:no_comma", "detectable_format:number_bullet_lists", "startend:quotation"]
    arguments: list[dict[str, Any]] = [{"num_bullets": None}, {"num_bullets": 1, "relation": None}, {}]
    text = 'Sure, here it is:\n"no comma\n* point"'
    assert followed_instructions(text, ids, arguments, loose=False) == [False, True, False]
    # Without its first line the text has no comma and is quoted.
    assert followed_instructions(text, ids, arguments, loose=True) == [True, True, True]
    scores = [
        instructions(text, ids, arguments, options=Options(loose=loose, level=level))
        for loose in (False, True)
        for level in ("prompt", "instruction")
    ]
    assert scores == [0.0, pytest.approx(1 / 3), 1.0, 1.0]


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(ValueError, match="unknown instruction 'punctuation:no_coma'; did you mean"):
        followed_instructions("a", ["punctuation:no_coma"], [{}], loose=False)


@pytest.mark.skipif(not IFEVAL.is_file(), reason="published data is not here")
def test_every_published_row_can_be_graded() -> None:
    pytest.importorskip("langdetect")
    rows = [json.loads(line) for line in IFEVAL.read_text(encoding="utf-8").splitlines()]
    graded = [
        followed_instructions(row["prompt"], row["instruction_id_list"], row["kwargs"], loose=False)
        for row in rows
    ]
    names = {name.removeprefix("en:") for row in rows for name in row["instruction_id_list"]}
    assert len(graded) > 300 and names == set(CHECKS)
