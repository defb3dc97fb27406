"""Differences of two models: tests by hand, intervals that agree with them, a rule that holds its rate."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from finetune.evaluation import intervals, paired_tests
from finetune.evaluation.comparison import Difference, compare, decide, more_items_needed
from finetune.evaluation.items import ItemResult
from finetune.evaluation.metrics import ACCURACY, Metric, mean_of
from finetune.evaluation.paired_tests import MCNEMAR, bonett_price_interval, holm, mcnemar_p_value

LOSS = Metric("loss", mean_of("loss"), better="lower", percent=False)
BIAS = Metric("bias", mean_of("bias"), better="neither", best=0.0)


def results(values, name="score", clusters=None) -> list[ItemResult]:
    return [
        ItemResult(str(n), str(n if clusters is None else clusters[n]), "", {name: float(value)}, {})
        for n, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("improved", "regressed", "p_value"),
    # Twice the binomial tail, by hand: 2 (1 + 10) / 2^10; 2 (1 + 8) / 2^8; 2 / 2^5.
    [(9, 1, 22 / 1024), (1, 7, 18 / 256), (5, 0, 2 / 32), (0, 0, 1.0), (3, 3, 1.0)],
)
def test_mcnemar_by_hand(improved, regressed, p_value) -> None:
    assert mcnemar_p_value(improved, regressed) == pytest.approx(p_value, rel=1e-12)


def test_bonett_and_price_by_hand() -> None:
    # 15 improved and 5 regressed of 98 items: (16 - 6) / 100 +- 1.96 sqrt((0.22 - 0.01) / 100).
    assert bonett_price_interval(15, 5, 98) == pytest.approx((0.1 - 0.08982, 0.1 + 0.08982), abs=1e-5)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_scores_of_independent_items_are_compared_by_mcnemar() -> None:
    before, after = [0] * 9 + [1] + [1] * 40, [1] * 9 + [0] + [1] * 40
    change = compare(ACCURACY, results(before), results(after)[::-1])
    assert change is not None and change.test == MCNEMAR
    assert (change.value, change.count, change.clusters, change.changed) == (0.16, 50, 50, 10)
    assert change.p_value == pytest.approx(22 / 1024)
    assert (change.low, change.high) == pytest.approx(bonett_price_interval(9, 1, 50))


def test_the_permutation_test_of_scores_is_mcnemar_s() -> None:
    before, after = [0] * 9 + [1] + [1] * 40, [1] * 9 + [0] + [1] * 40
    scaled = [[2 * score for score in scores] for scores in (before, after)]
    change = compare(LOSS, results(scaled[0], "loss"), results(scaled[1], "loss"))
    assert change is not None and change.test == paired_tests.EXACT_SWAPS
    assert change.p_value == pytest.approx(22 / 1024, rel=1e-9)


def test_the_permutation_test_swaps_whole_clusters() -> None:
    """Against all sign flips of six clusters' differences, written out."""
    generator = np.random.default_rng(3)
    clusters = np.repeat(np.arange(6), [1, 2, 3, 1, 4, 2])
    before, after = generator.normal(size=13), generator.normal(0.9, size=13)
    change = compare(LOSS, results(before, "loss", clusters), results(after, "loss", clusters))
    sums = np.bincount(clusters, after - before)
    flipped = np.array([np.dot(signs, sums) for signs in product([-1, 1], repeat=6)])
    exact = np.mean(np.abs(flipped) >= abs(sums.sum()) - 1e-9)
    assert change is not None and change.value == pytest.approx(sums.sum() / 13)
    assert change.clusters == 6 and change.p_value >= exact - 1e-12
    p_value, _ = paired_tests.swap_test(
        lambda first, second: second[:, 0] - first[:, 0],
        *(np.bincount(clusters, values)[:, None] for values in (before, after)),
        seed=0,
    )
    assert p_value == pytest.approx(exact)


def test_random_permutations_approximate_all() -> None:
    generator = np.random.default_rng(5)
    before, after = generator.normal(size=(30, 1)), generator.normal(0.45, size=(30, 1))
    p_value, test = paired_tests.swap_test(lambda a, b: (b - a)[:, 0], before, after, 0)
    differences = (after - before)[:, 0]
    # Normal approximation of the sum of random signs times the differences.
    z = abs(differences.sum()) / np.sqrt((differences**2).sum())
    assert test == paired_tests.RANDOM_SWAPS and 1.5 < z < 3
    assert p_value == pytest.approx(2 * (1 - intervals.ndtr(z)), rel=0.2)


def test_the_direction_is_the_metric_s() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=100)
    lower_loss = compare(
        LOSS, results(values, "loss"), results(values - 1 + generator.normal(size=100), "loss")
    )
    less_bias = compare(
        BIAS, results(values - 4, "bias"), results(values + 0.5 + generator.normal(size=100), "bias")
    )
    improved = compare(ACCURACY, results([0] * 30), results([1] * 30))
    regressed = compare(ACCURACY, results([1] * 30), results([0] * 30))
    differences = [entry for entry in (lower_loss, less_bias, improved, regressed) if entry is not None]
    assert [entry.verdict for entry in decide(differences)] == ["better", "better", "better", "worse"]
    # The mean moves from about -4 to about +0.5: its distance from 0 shrinks by 3.5.
    assert less_bias is not None and less_bias.value == pytest.approx(-3.5, abs=0.4)


def test_verdict_and_interval_never_contradict_each_other() -> None:
    shown = {True: 0, False: 0}
    for improved, regressed in product(range(0, 40, 3), repeat=2):
        change = compare(
            ACCURACY,
            results([0] * improved + [1] * regressed + [1] * 30),
            results([1] * improved + [0] * regressed + [1] * 30),
        )
        assert change is not None
        for family in ([change], [change] * 4):
            decision = decide(family)[0]
            excludes_zero = decision.low > 0 or decision.high < 0
            assert (decision.verdict != "not shown") == excludes_zero, (improved, regressed)
            assert decision.low <= change.value <= decision.high
            shown[excludes_zero] += 1
    assert min(shown.values()) > 50


def test_verdict_and_bootstrap_never_contradict_each_other(monkeypatch) -> None:
    monkeypatch.setattr(intervals, "REPLICATES", 400)
    monkeypatch.setattr(paired_tests, "NUM_SWAPS", 499)
    generator = np.random.default_rng(0)
    shown = {True: 0, False: 0}
    for size, shift in product((2, 3, 6, 12, 30), np.linspace(-1.2, 1.2, 9)):
        before = generator.integers(0, 4, size)
        after = before + np.round(generator.normal(shift, 1, size))
        change = compare(LOSS, results(before, "loss"), results(after, "loss"))
        assert change is not None
        excludes_zero = change.low > 0 or change.high < 0
        assert (decide([change])[0].verdict != "not shown") == excludes_zero == (change.p_value <= 0.05)
        shown[excludes_zero] += 1
    assert min(shown.values()) > 5


def test_a_model_is_rarely_better_than_itself() -> None:
    """Two metrics, one of clustered scores: 300 families, at most 5 % wrong within the rate's error."""
    generator = np.random.default_rng(7)
    clusters = np.repeat(np.arange(30), 3)
    wrong = 0
    for seed in range(300):
        difficulty = generator.uniform(size=(30, 1))
        first, second = (generator.uniform(size=(30, 3)) < difficulty for _ in range(2))
        independent = [generator.integers(2, size=100) for _ in range(2)]
        family = [
            compare(
                ACCURACY,
                *(results(scores.ravel(), clusters=clusters) for scores in (first, second)),
                seed=seed,
            ),
            compare(ACCURACY, *map(results, independent)),
        ]
        decisions = decide([entry for entry in family if entry is not None])
        wrong += any(entry.verdict != "not shown" for entry in decisions)
    # 15 expected at most; its 99.9 % quantile is 27.
    assert 0 < wrong <= 27


def test_equal_answers_show_nothing() -> None:
    change = compare(ACCURACY, results([1] * 20), results([1] * 20))
    assert change is not None and (change.value, change.changed, change.p_value) == (0, 0, 1)
    assert change.low < 0 < change.high and decide([change])[0].verdict == "not shown"
    assert more_items_needed(change) is None


def test_the_number_of_items_is_the_textbook_s() -> None:
    """80 % power for a difference of 0.1 with a standard error of 0.05 on 100 items: 196 items."""
    change = Difference("accuracy", 0.1, 0, 0.2, 0.06, MCNEMAR, 100, 100, 30, 0.05)
    # 100 (2.8016 x 0.05 / 0.1)^2 = 196.2, so 96.2 more, rounded up to two digits.
    assert more_items_needed(change) == 97
    assert more_items_needed(replace(change, value=0.01)) == 20_000
    assert more_items_needed(replace(change, std_error=0.01)) == 0


def test_undefined_metrics_and_other_items() -> None:
    assert compare(LOSS, results([1, 0]), results([1, 1])) is None
    with pytest.raises(ValueError, match="different items"):
        compare(ACCURACY, results([1, 0]), results([1]))
