"""Findings of every stage: each fires on its history, and none on a healthy one."""

import math

import numpy as np
import pytest

from finetune.training.curve_findings import curve_findings
from finetune.training.metric_specs import MetricSpec

SFT = MetricSpec()
RL = MetricSpec(main="objective/reward", allows_zero_gradients=True)


def history(
    loss: list[float] | None = None,
    held_out: list[float] | None = None,
    *,
    every: int = 10,
    main: str = "loss",
    **curves: list[float],
) -> dict:
    """Return metrics.jsonl and the metrics of run.json; ``held_out`` has the values before and after too."""
    series = ({"loss": loss} if loss else {}) | {
        name.replace("__", "/"): values for name, values in curves.items()
    }
    entries = [
        {"step": index + 1, **{name: values[index] for name, values in series.items()}}
        for index in range(len(next(iter(series.values()), [])))
    ]
    metrics = {}
    if held_out:
        entries += [{"step": every * (i + 1), f"eval/{main}": value} for i, value in enumerate(held_out[1:])]
        metrics = {f"eval/{main}_before": held_out[0], f"eval/{main}_after": held_out[-1]}
    return {"entries": entries, "metrics": metrics}


def found(entries: list, metrics: dict, spec: MetricSpec = SFT, *, documents: bool = False) -> dict[str, str]:
    findings = curve_findings(entries, metrics, spec, sample_tokens=12, documents=documents)
    assert all(finding.action and finding.format_line().startswith("!!") for finding in findings)
    return {finding.name: finding.format_line() for finding in findings}


def falling(steps: int, *, noise: float, start: float = 2.0, end: float = 1.2, seed: int = 0) -> list[float]:
    random = np.random.default_rng(seed)
    return [end + (start - end) * math.exp(-3 * i / steps) + noise * random.normal() for i in range(steps)]


NOISY_FLAT = [2.0 + 0.2 * value for value in np.random.default_rng(1).normal(size=40)]
HEALTHY = {
    "falling": history(falling(40, noise=0.05), [2.0, 1.6, 1.4, 1.3]),
    "flat and noisy": history(NOISY_FLAT, [2.0, 1.99, 2.0, 1.995]),
    "one step": history([2.0], [2.0, 1.9]),
    "two equal steps": history([2.0, 2.05]),
    "held-out noise at the end": history(falling(60, noise=0.1), [2.0, 1.5, 1.42, 1.46, 1.4, 1.44, 1.41]),
    "falling, two points": history([0.7, 0.1], [0.8, 0.5]),
    "no entries": history(),
    "negative losses": history([-v for v in reversed(falling(40, noise=0.02))]),
    "nonzero gradients": history(falling(20, noise=0.01), grad_norm=[1.0] * 20),
    "one zero gradient": history(falling(20, noise=0.01), grad_norm=[0.0] + [1.0] * 18 + [0.0]),
    "all zero gradients": history(falling(20, noise=0.01), grad_norm=[0.0] * 20),  # the run fails
}
HISTORIES = {
    "overfitting": (
        history(falling(40, noise=0.05), [2.0, 1.5, 1.6, 1.9, 2.3]),
        {"held-out loss": "(1.5000), 2.3000 at the end (step 40): later steps fit the training rows"},
    ),
    "overfitting without a measurement between": (
        history(falling(10, noise=0.01), [1.5, 1.9]),
        {"held-out loss": "best before training (1.5000)"},
    ),
    "overfitting of pairs": (
        history([0.7, 0.1], [0.6931, 0.71]),
        {"held-out loss": "(overfitting) -> lower train.learning_rate, train.evaluate_every=N"},
    ),
    "overfitting of pairs, in action": (
        history([0.7, 0.1], [0.5, 0.8]),
        {"held-out loss": "fewer train.epochs"},
    ),
    "updates too large for pairs": (
        history([0.1, 0.7], [0.5, 0.8]),
        {"loss": "above its start", "held-out loss": "updates are too large -> lower train.learning_rate"},
    ),
    "diverged": (
        history([2.0, 2.5, 6.0, 8.0, 9.0, 8.5, 9.2, 9.0], [2.0, 9.0]),
        {"loss": "2.2500 → 9.1", "held-out loss": "updates are too large"},
    ),
    "slow rise": (history([2.0 + 0.02 * i for i in range(40)]), {"loss": "above its start"}),
    "dead gradients": (
        history(falling(20, noise=0.01), grad_norm=[1.0] * 12 + [0.0] * 8),
        {"gradients": "from step 13 to the end (step 20)"},
    ),
    "mostly dead gradients": (
        history(falling(20, noise=0.01), grad_norm=[0.0, 0.0, 1.0] * 6 + [0.0, 1.0]),
        {"gradients": "13 of 20"},
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_findings(name: str) -> None:
    assert found(**HEALTHY[name]) == {}


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_no_finding(seed: int) -> None:
    random = np.random.default_rng(seed)
    loss = falling(60, noise=0.15, seed=seed)
    held_out = [1.2 + 0.8 * math.exp(-i) + 0.02 * random.normal() for i in range(10)]
    assert found(**history(loss, held_out)) == {}


@pytest.mark.parametrize("name", HISTORIES)
def test_each_finding(name: str) -> None:
    given, expected = HISTORIES[name]
    findings = found(**given)
    assert findings.keys() == expected.keys()
    assert all(text in findings[key] for key, text in expected.items()), findings


def test_overfitting_names_the_best_step_as_the_remedy() -> None:
    given, _ = HISTORIES["overfitting"]
    assert "-> train.max_steps=10, lower train.learning_rate, or more rows" in found(**given)["held-out loss"]


REWARDS = {"main": "objective/reward"}


@pytest.mark.parametrize(("noise", "reported"), [(None, True), (0.05, True), (0.3, False)])
def test_a_drop_of_the_reward_is_compared_with_its_noise(noise: float | None, reported: bool) -> None:
    given = history([1.0, 5.0, 9.0], [-0.01, 0.3, 0.1], **REWARDS)
    findings = curve_findings(**given, spec=RL, sample_tokens=12, reward_noise=noise)
    assert bool(findings) == reported


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (history(NOISY_FLAT, [0.1, 0.5, 0.6, 0.62], **REWARDS), {}),
        (
            history([1.0, 5.0, 9.0], [0.1, 0.9, 0.5, 0.3], **REWARDS),
            {"held-out reward": "best at step 10 (0.9000)"},
        ),
        (history(grad_norm=[1.0] * 18 + [0.0, 0.0], val__eos_rate=[0.0] * 19 + [0.1]), {}),
        (history(grad_norm=[1.0] * 10 + [0.0] * 10), {"gradients": "equal rewards"}),
        # RL checks its first completions itself, before the first update.
        (history(val__eos_rate=[0.0] * 6), {}),
    ],
)
def test_findings_of_rl(given: dict, expected: dict[str, str]) -> None:
    findings = found(**given, spec=RL)
    assert findings.keys() == expected.keys()
    assert all(text in findings[name] for name, text in expected.items()), findings


@pytest.mark.parametrize(
    ("before", "after", "documents", "expected"),
    [
        (0.0, 0.25, False, ""),
        (0.0, 0.0, True, ""),
        (0.0, 0.0, False, "raise evaluate.max_new_tokens"),
        (0.5, 0.0, False, "before training 50% did"),
    ],
)
def test_completions_that_never_end(before: float, after: float, documents: bool, expected: str) -> None:
    metrics = {"samples/eos_rate_before": before, "samples/eos_rate_after": after}
    findings = found([{"step": 1}], metrics, documents=documents)
    assert bool(findings) == bool(expected) and expected in findings.get("endings", "")
