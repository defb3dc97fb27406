"""Escaping markers: it terminates, leaves no marker, and does not change other text."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_templates.markers import Markers
from data_templates.segments import BOS, Segment, TemplateError, escape_at_boundaries, markup

COMMON = ["</s>", "<|im_start|>", "<|im_end|>", "### Response:", "USER:", "[INST]", "<<SYS>>", "<</SYS>>"]


def occurrences(text, markers):
    """Count markers wherever they begin, overlapping ones too."""
    return sum(text.startswith(marker, start) for marker in markers for start in range(len(text)))


@pytest.mark.parametrize(
    ("text", "harmless", "count"),
    [
        ("", "", 0),
        ("nothing here", "nothing here", 0),
        ("a</s>b", "a< /s>b", 1),
        ("</s></s>", "< /s>< /s>", 2),
        ("### Response: x", "# ## Response: x", 1),
        ("#### Response: x", "## ## Response: x", 1),
        ("<<SYS>>[INST]", "< <SYS>>[ INST]", 2),
        ("<|im_<|im_start|>start|>", "<|im_< |im_start|>start|>", 1),
        ("SUPERUSER: yes", "SUPERU SER: yes", 1),
    ],
)
def test_escape_examples(text, harmless, count):
    assert Markers.of(COMMON).escape_markers(text) == (harmless, count)


@settings(deadline=None)
@given(
    markers=st.lists(st.text(alphabet="ab <", min_size=1, max_size=4), max_size=5),
    text=st.text(alphabet="ab <|", max_size=30),
)
def test_escape_terminates_and_leaves_no_marker(markers, text):
    # Spaces as markers, one-character markers, markers that an inserted space completes: all must terminate.
    harmless, count = Markers.of(markers).escape_markers(text)
    assert occurrences(harmless, markers) == 0
    assert (count == 0) == (harmless == text)
    assert Markers.of(markers).escape_markers(harmless) == (harmless, 0)


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from([*COMMON, "<", "s>", "|", " ", "USE", "R:", "한", "\n"]), max_size=12))
def test_practical_markers_only_gain_spaces(parts):
    text = "".join(parts)
    harmless, _ = Markers.of(COMMON).escape_markers(text)
    assert re.sub(r"\s", "", harmless) == re.sub(r"\s", "", text)


def test_empty_markers_count_as_none():
    assert Markers.of(["", ""]).escape_markers("text") == ("text", 0)


def test_two_contents_cannot_form_a_marker():
    pieces = [BOS, Segment("content", "a</"), Segment("content", "s>b", True, reply=True)]
    result, count = escape_at_boundaries(pieces, Markers.of(COMMON))
    # The later one moves: the earlier is a prompt, and must not depend on what follows.
    assert [piece.text for piece in result] == ["", "a</", " s>b"]
    assert count == 1


def test_content_and_markup_cannot_form_a_marker():
    pieces = [Segment("content", "SUPERUS"), markup("ER: x")]
    result, count = escape_at_boundaries(pieces, Markers.of(COMMON))
    assert ([piece.text for piece in result], count) == (["SUPERUS ", "ER: x"], 1)


def test_a_marker_over_three_pieces_is_found():
    pieces = [Segment("content", "<"), Segment("content", "/"), Segment("content", "s>")]
    result, count = escape_at_boundaries(pieces, Markers.of(COMMON))
    assert ("".join(piece.text for piece in result), count) == ("</ s>", 1)


def test_the_templates_own_marker_in_two_pieces_stays():
    pieces = [markup("US"), markup("ER: "), Segment("content", "hi")]
    assert escape_at_boundaries(pieces, Markers.of(COMMON)) == (pieces, 0)


def test_no_marker_joins_across_an_end_of_turn():
    pieces = [Segment("content", "</", reply=True), Segment("eos", reply=True), markup("s>")]
    assert escape_at_boundaries(pieces, Markers.of(COMMON)) == (pieces, 0)


def test_a_marker_that_no_space_can_break_is_rejected():
    pieces = [Segment("content", "a"), Segment("content", " b")]
    with pytest.raises(TemplateError, match="form a marker that no space can break"):
        escape_at_boundaries(pieces, Markers.of(["a ", " b"]))


@settings(deadline=None)
@given(
    texts=st.lists(st.text(alphabet="<|ab/s>", max_size=5), max_size=6),
    kinds=st.lists(st.sampled_from(["content", "markup"]), min_size=6, max_size=6),
)
def test_markers_across_boundaries_are_the_templates_own(texts, kinds):
    markers = Markers.of(["</s>", "<|a", "ab/", "ss"])
    pieces = [
        Segment(kind, markers.escape_markers(text)[0] if kind == "content" else text)
        for text, kind in zip(texts, kinds, strict=False)
    ]
    result, _ = escape_at_boundaries(pieces, markers)
    text = "".join(piece.text for piece in result)
    theirs = "".join(("1" if piece.kind == "content" else "0") * len(piece.text) for piece in result)
    for start in range(len(text)):
        if match := markers.pattern.match(text, start):
            assert "1" not in theirs[start : match.end()], (text, match)
