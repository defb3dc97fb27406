"""Mixing rates, quotas and sampling: values derived by hand, and properties."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import mixture

RATES = st.lists(st.floats(0.001, 1), min_size=1, max_size=8).map(lambda raw: [r / sum(raw) for r in raw])


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(mixture).failed == 0 and doctest.testmod(mixture).attempted == 5


@pytest.mark.parametrize(
    ("sizes", "limit", "temperature", "expected"),
    [
        # By size: 100 / 500, 400 / 500.
        ([100, 400], None, 1, [0.2, 0.8]),
        # FLAN's maximum K = 3,000: 500 / 6500, twice 3000 / 6500.
        ([500, 3000, 30000], 3000, 1, [500 / 6500, 3000 / 6500, 3000 / 6500]),
        # T = 2: square roots, 10 / 30 and 20 / 30.
        ([100, 400], None, 2, [1 / 3, 2 / 3]),
        # T5's K before its T: min(1600, 400)^(1/2) = 20.
        ([100, 1600], 400, 2, [1 / 3, 2 / 3]),
        # T = 4: fourth roots of 16 and 81 are 2 and 3.
        ([16, 81], None, 4, [0.4, 0.6]),
        ([7], 3, 2, [1.0]),
    ],
)
def test_rates_by_size_limit_and_temperature(sizes, limit, temperature, expected):
    assert mixture.size_proportional_rates(sizes, limit=limit, temperature=temperature) == pytest.approx(
        expected
    )


def test_a_high_temperature_makes_all_sources_equal():
    assert mixture.size_proportional_rates([1, 10, 10**6], temperature=1e9) == pytest.approx([1 / 3] * 3)


def test_shares_are_fractions_of_the_mixture_and_the_others_divide_the_rest():
    # 0.05 and 0.15 are taken; 30 : 10 divide 0.8 as 0.6 : 0.2.
    assert mixture.apply_fixed_shares([30, 0, 10, 0], [None, 0.05, None, 0.15]) == pytest.approx(
        [0.6, 0.05, 0.2, 0.15]
    )


def test_an_epoch_ends_when_the_first_source_is_exhausted():
    assert mixture.max_rows_without_repeats([95, 50], [0.95, 0.05]) == 100
    assert mixture.max_rows_without_repeats([3, 70], [0.3, 0.7]) == 10  # 3 / 0.3 is a hair below 10
    assert mixture.max_rows_without_repeats([60, 60], [0.75, 0.25]) == 80


@given(RATES, st.integers(0, 5000))
def test_quotas_add_up_and_are_within_one_row_of_the_rate(rates, total):
    counts = mixture.allocate_rows(total, rates)
    assert sum(counts) == total
    assert all(abs(count - total * rate) < 1 + 1e-6 for count, rate in zip(counts, rates, strict=True))


@given(RATES, st.data())
def test_no_row_repeats_before_the_first_source_is_exhausted(rates, data):
    sizes = [data.draw(st.integers(1, 500)) for _ in rates]
    counts = mixture.allocate_rows(mixture.max_rows_without_repeats(sizes, rates), rates)
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))


@pytest.mark.parametrize(("size", "count"), [(10, 0), (10, 4), (10, 10), (10, 23), (1, 3)])
def test_rows_repeat_only_after_all_were_used(size, count):
    sampled = mixture.sample_row_ids(size, count, np.random.default_rng(0))
    times = np.bincount(sampled, minlength=size)
    assert len(sampled) == count and sampled == sorted(sampled)
    assert times.max() - times.min() <= 1 and times.sum() == count


def test_sampling_is_a_function_of_the_seed():
    one, same, other = (mixture.sample_row_ids(100, 10, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one == same and one != other
