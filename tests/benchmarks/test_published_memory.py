"""PUBLISHED.md is up to date, and plans are close to the published figures."""

from pathlib import Path

import pytest

from benchmarks import published_memory
from benchmarks.published_memory import PUBLISHED_CASES, PublishedCase, published_page
from finetune.planner.memory import plan_memory
from finetune.planner.parameter_count import count_trainable_parameters

PAGE = Path(published_memory.__file__).with_name("PUBLISHED.md")
LITGPT = [case for case in PUBLISHED_CASES if case.source == published_memory.LITGPT]


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == published_page(), "python -m benchmarks.published_memory"


@pytest.mark.parametrize("case", LITGPT, ids=lambda case: f"{case.title} {case.settings}")
def test_settings_match_the_publication(case: PublishedCase) -> None:
    trainable = count_trainable_parameters(case.workload.architecture, case.workload.adapter)
    assert trainable == {32: 4_194_304, 40: 6_553_600}[case.workload.architecture.num_layers]


@pytest.mark.parametrize("case", LITGPT, ids=lambda case: f"{case.title} {case.settings}")
def test_peaks_are_close_to_published_figures(case: PublishedCase) -> None:
    assert case.published_bytes is not None
    tolerance = 0.10 if case.workload.quantization == "none" else 0.25
    assert case.peak.total == pytest.approx(case.published_bytes, rel=tolerance)


def test_published_fits_fit() -> None:
    fits = {
        (case.title, case.source): case.peak.total <= case.available_bytes
        for case in PUBLISHED_CASES
        if case.available_bytes and "does not fit" not in case.published_text and not case.different_loader
    }
    assert all(fits.values()) and len(fits) >= 5


def test_published_misfits_do_not_fit() -> None:
    too_large = [
        case for case in PUBLISHED_CASES if case.available_bytes and case.peak.total > case.available_bytes
    ]
    assert [case.title for case in too_large] == ["llama-2-70b, QLoRA", "llama-2-70b, full fine-tuning"]
    assert too_large[0].different_loader and too_large[0].peak.name == "load"


def test_zero3_static_memory_matches_the_paper() -> None:
    for case in PUBLISHED_CASES:
        if case.source == published_memory.ZERO_PAPER:
            static_categories = ("base", "adapter", "gradients", "optimizer")
            step = next(phase for phase in plan_memory(case.workload) if phase.name == "optimizer step")
            assert case.published_bytes is not None
            assert sum(step.categories[category] for category in static_categories) == pytest.approx(
                case.published_bytes, rel=0.02
            )
            assert case.peak.total > case.published_bytes
