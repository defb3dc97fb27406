"""PUBLISHED.md is up to date, and plans are close to the published figures."""

from pathlib import Path

import pytest

from finetune.planning import published
from finetune.planning.memory import plan_memory
from finetune.planning.published import CASES, Case, page
from finetune.planning.trained import trained_parameters

PAGE = Path(published.__file__).with_name("PUBLISHED.md")
LITGPT = [case for case in CASES if case.source == published.LITGPT]


def test_the_page_is_made_of_the_data() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m finetune.planning.published_memory"


@pytest.mark.parametrize("case", LITGPT, ids=lambda case: f"{case.what} {case.settings}")
def test_settings_are_those_that_were_published(case: Case) -> None:
    trained = trained_parameters(case.step.architecture, case.step.adapter)
    assert trained == {32: 4_194_304, 40: 6_553_600}[case.step.architecture.layers]


@pytest.mark.parametrize("case", LITGPT, ids=lambda case: f"{case.what} {case.settings}")
def test_unquantized_peaks_are_within_a_tenth_and_4_bit_ones_within_a_quarter(case: Case) -> None:
    assert case.figure is not None
    near = 0.10 if case.step.quantization == "none" else 0.25
    assert case.peak.total == pytest.approx(case.figure, rel=near)


def test_what_is_said_to_fit_fits() -> None:
    fits = {
        (case.what, case.source): case.peak.total <= case.room
        for case in CASES
        if case.room and "does not fit" not in case.told and not case.another_way
    }
    assert all(fits.values()) and len(fits) >= 5


def test_what_is_said_not_to_fit_does_not() -> None:
    too_large = [case for case in CASES if case.room and case.peak.total > case.room]
    assert [case.what for case in too_large] == ["llama-2-70b, QLoRA", "llama-2-70b, full fine-tuning"]
    assert too_large[0].another_way and too_large[0].peak.name == "load"


def test_zero_3_holds_what_the_paper_s_formula_says_and_more() -> None:
    for case in CASES:
        if case.source == published.ZERO:
            held = ("base", "adapter", "gradients", "optimizer")
            step = next(phase for phase in plan_memory(case.step) if phase.name == "optimizer step")
            assert case.figure is not None
            assert sum(step.parts[part] for part in held) == pytest.approx(case.figure, rel=0.02)
            assert case.peak.total > case.figure
