"""The benchmark of verdicts: known effects have their size, equal models are equal, draws do not overlap."""

import numpy as np
import pytest

from benchmarks import verdict


def test_proportions_have_the_exact_interval() -> None:
    # Clopper and Pearson: (alpha / 2)^(1 / n) for n of n, and its complement for 0 of n.
    assert verdict.proportion(0, 400)["high"] == pytest.approx(1 - 0.025 ** (1 / 400), abs=1e-9)
    assert verdict.verdict_rates(["better", "not shown", "worse", "better"])["either"]["rate"] == 0.75


def test_replacing_a_fraction_of_replies_has_the_stated_effect() -> None:
    generator = np.random.default_rng(0)
    scores = (generator.random(200_000) < 0.6).astype(float)
    # 10 % of the replies become right, of which 40 % were wrong; or wrong, of which 60 % were right.
    assert verdict.replace(scores, 0.1, generator).mean() - scores.mean() == pytest.approx(0.04, abs=0.003)
    assert verdict.replace(scores, -0.1, generator).mean() - scores.mean() == pytest.approx(-0.06, abs=0.003)
    assert verdict.replace(scores, 0.0, generator).tolist() == scores.tolist()


def test_two_answers_of_a_prompt_have_different_seeds() -> None:
    seeds_SN = np.repeat(np.arange(5.0)[:, None], 300, axis=1)
    first, second = verdict.two_answers(seeds_SN, np.random.default_rng(0))
    assert first.shape == (300,) and not np.any(first == second)
    assert set(first) == set(second) == set(range(5))


def test_recipes_are_drawn_without_overlap() -> None:
    runs, others = range(40), range(40, 60)
    for a, b in verdict.draws(runs, runs, 0):
        assert len({*a, *b}) == 10 and max(*a, *b) < 40
    for a, b in verdict.draws(runs, others, 0):
        assert len(set(a)) == len(set(b)) == 5 and max(a) < 40 <= min(b)


def test_a_sequential_comparison_stops_at_a_look() -> None:
    before, after = verdict.as_results(np.zeros(400)), verdict.as_results(np.ones(400))
    name, used = verdict.sequential_verdict(before, after, seed=0)
    assert name == "better" and used == verdict.LOOK_EVERY
    assert verdict.sequential_verdict(before, before, seed=0) == ("not shown", 400)
