"""Findings of every stage, from the curves of a finished run: loss, gradients, held-out metric, endings.

Pure functions of metrics.jsonl and run.json. A stage adds its own findings (``Diagnoses``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from finetune.training.findings import Finding
from finetune.training.metric_specs import MetricSpec
from finetune.training.metrics import EVAL_PREFIX

MIN_RISE = 0.005
"""Relative rise of a loss that is reported; less is noise with a few dozen rows."""
MIN_REWARD_DROP = 0.05
"""Relative drop of a held-out reward that is reported where its noise is unknown."""
NOISE_FACTOR = 5.0
"""How many standard deviations of its noise a curve has to rise."""
BEST_NOISE_FACTOR = 6.0
"""The same for the best point of a curve, which is the luckiest of all."""
MIN_NOISE_POINTS = 5
"""Points of a curve from which its noise is estimated."""
MAX_WINDOW = 10
"""Log entries that are averaged at each end of a curve, at most."""
UNKNOWN_NOISE_RISE = 0.1
"""Relative rise that is reported of a training loss with fewer points."""
MAX_ZERO_GRADIENT_FRACTION = 0.5
"""Fraction of steps with a zero gradient from which most of the training is without effect."""
NORMAL_DEVIATION = 0.6745
"""Median absolute value of a normal variable, in standard deviations."""


@dataclass(frozen=True, slots=True)
class RunCurves:
    """What the findings read.

    Attributes:
        entries: metrics.jsonl.
        metrics: the metrics of run.json, ``..._before`` and ``..._after``.
        main: the held-out metric: ``loss``, or a reward (RL), whose runs have no loss that should fall.
        allows_zero_gradients: whether single steps may have zero gradients.
        sample_tokens: ``evaluate.max_new_tokens``.
        documents: whether the data are documents, whose continuations need not end.
        reward_noise: half width of the 95 % interval of a change of the held-out reward; None: unknown.
    """

    entries: Sequence[Mapping[str, float]]
    metrics: Mapping[str, float]
    main: str = "loss"
    allows_zero_gradients: bool = False
    sample_tokens: int = 0
    documents: bool = False
    reward_noise: float | None = None

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of the entries with a metric."""
        return [(int(entry["step"]), entry[metric]) for entry in self.entries if metric in entry]

    @property
    def last_step(self) -> int:
        return max((int(entry["step"]) for entry in self.entries), default=0)


def curve_findings(
    entries: Sequence[Mapping[str, float]],
    metrics: Mapping[str, float],
    spec: MetricSpec,
    *,
    sample_tokens: int,
    documents: bool = False,
    reward_noise: float | None = None,
) -> list[Finding]:
    """Return the findings of a finished run; empty for a healthy one.

    Args:
        entries: metrics.jsonl.
        metrics: the metrics of run.json.
        spec: what the stage measures.
        sample_tokens: ``evaluate.max_new_tokens``.
        documents: whether the data are documents.
        reward_noise: half width of the 95 % interval of a change of the held-out reward; None: unknown.
    """
    curves = RunCurves(
        entries, metrics, spec.main, spec.allows_zero_gradients, sample_tokens, documents, reward_noise
    )
    return [finding for diagnostic in CURVE_DIAGNOSTICS if (finding := diagnostic(curves)) is not None]


def end_window(num_values: int) -> int:
    """Return the log entries that are averaged at both ends of a curve: a single one is noisy.

    A quarter at most: the mean over a short run would contain its other end.

    >>> [end_window(count) for count in (1, 7, 20, 400)]
    [1, 1, 5, 10]
    """
    return max(1, min(MAX_WINDOW, num_values // 4))


def end_means(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of a curve over its first and its last ``end_window`` entries."""
    window = end_window(len(values))
    return sum(values[:window]) / window, sum(values[-window:]) / window


def level_noise(values: Sequence[float]) -> float:
    """Return the standard deviation of a curve around its trend, from successive differences.

    The median of the absolute differences ignores a few jumps; 0.0 for fewer than 5 points.
    """
    if len(values) < MIN_NOISE_POINTS:
        return 0.0
    differences = [abs(after - before) for before, after in zip(values, values[1:], strict=False)]
    return median(differences) / NORMAL_DEVIATION / 2**0.5


def curvature_noise(values: Sequence[float]) -> float:
    """Return the same from second differences, which a steady rise or fall leaves at 0."""
    if len(values) < MIN_NOISE_POINTS:
        return 0.0
    triples = zip(values, values[1:], values[2:], strict=False)
    differences = [abs(first - 2 * second + third) for first, second, third in triples]
    # The second difference of independent noise has 6 times its variance.
    return median(differences) / NORMAL_DEVIATION / 6**0.5


def _training_loss(curves: RunCurves) -> Finding | None:
    """Loss above its start: the updates are too large, or the loss has the wrong sign."""
    values = [value for _, value in curves.points("loss")]
    if curves.main != "loss" or len(values) < 2:
        return None
    first, end = end_means(values)
    rise = MIN_RISE if len(values) >= MIN_NOISE_POINTS else UNKNOWN_NOISE_RISE
    if end - first <= max(rise * abs(first), NOISE_FACTOR * level_noise(values)):
        return None
    window = end_window(len(values))
    ends = f" (first and last {window} log entries)" if window > 1 else ""
    evidence = f"training loss {first:.4f} → {end:.4f}{ends}, lowest {min(values):.4f}"
    meaning = "it ends above its start: the updates are too large"
    return Finding("loss", evidence, meaning, "lower train.learning_rate, or a longer train.warmup")


def _held_out(curves: RunCurves) -> Finding | None:
    """Held-out metric that ends worse than its best."""
    name = EVAL_PREFIX + curves.main
    before, after = (curves.metrics.get(f"{name}_{when}") for when in ("before", "after"))
    if before is None or after is None:
        return None
    is_loss, last_step = curves.main == "loss", curves.last_step
    between = [(step, value) for step, value in curves.points(name) if 0 < step < last_step]
    points = [(0, before), *between, (last_step, after)]
    sign = 1.0 if is_loss else -1.0
    best_step, best = min(points, key=lambda point: sign * point[1])
    noise = BEST_NOISE_FACTOR * curvature_noise([value for _, value in points])
    smallest = (MIN_RISE if is_loss else MIN_REWARD_DROP) * abs(best)
    if not is_loss and curves.reward_noise is not None:
        smallest = curves.reward_noise
    if sign * (after - best) <= max(smallest, noise):
        return None
    label = "held-out loss" if is_loss else "held-out reward"
    where = "before training" if best_step == 0 else f"at step {best_step}"
    evidence = f"best {where} ({best:.4f}), {after:.4f} at the end (step {last_step})"
    return _held_out_finding(curves, label, evidence, best_step=best_step, measured_between=bool(between))


def _held_out_finding(
    curves: RunCurves, label: str, evidence: str, *, best_step: int, measured_between: bool
) -> Finding:
    if curves.main != "loss":
        meaning = "the policy became worse on held-out prompts"
    elif _training_loss(curves) is not None:
        meaning = "the training loss rose too: updates are too large"
        return Finding(label, evidence, meaning, "lower train.learning_rate")
    else:
        meaning = "later steps fit the training rows alone (overfitting)"
    shorter = f"train.max_steps={best_step}" if best_step else "lower train.learning_rate"
    if not best_step and not measured_between:
        shorter += ", train.evaluate_every=N to see where it turns"
    rest = "lower train.learning_rate, or more rows" if best_step else "fewer train.epochs, or more rows"
    return Finding(label, evidence, meaning, f"{shorter}, {rest}")


def _gradients(curves: RunCurves) -> Finding | None:
    """Gradients that are exactly 0, from some step on or in most steps."""
    norms = curves.points("grad_norm")
    zero_steps = [step for step, norm in norms if norm == 0]
    # All of them: the run has learned nothing, which fails it.
    if not zero_steps or len(zero_steps) == len(norms):
        return None
    last_nonzero = max(step for step, norm in norms if norm != 0)
    dead = [step for step in zero_steps if step > last_nonzero]
    num_allowed = max(2, len(norms) // 5) if curves.allows_zero_gradients else 1
    if len(dead) > num_allowed:
        evidence = f"gradient norm 0 from step {dead[0]} to the end (step {dead[-1]})"
        shorter = f"train.max_steps={last_nonzero}; "
    elif len(zero_steps) > MAX_ZERO_GRADIENT_FRACTION * len(norms):
        evidence, shorter = f"gradient norm 0 in {len(zero_steps)} of {len(norms)} logged steps", ""
    else:
        return None
    if curves.allows_zero_gradients:
        meaning = "these steps trained nothing: the completions of each prompt had equal rewards"
        action = "a finer reward, more sampling.num_generations, or raise sampling.temperature"
    else:
        meaning = "these steps trained nothing: the loss no longer depends on the trained weights"
        action = "lower train.learning_rate, or a loss that does not saturate"
    return Finding("gradients", evidence, meaning, shorter + action)


def _endings(curves: RunCurves) -> Finding | None:
    """Completions of samples.jsonl that never end with EOS; RL checks its first sampled ones itself."""
    before, after = (curves.metrics.get(f"samples/eos_rate_{when}") for when in ("before", "after"))
    if after is None or after > 0 or curves.documents:
        return None
    evidence = f"no completion of samples.jsonl ends with EOS within {curves.sample_tokens} tokens"
    if before and curves.main != "loss":
        action = "lower train.learning_rate, or rewards.length_penalty above what a token earns"
        return Finding("endings", evidence, f"before training {before:.0%} did", action)
    if before:
        meaning = f"before training {before:.0%} did"
        action = "lower train.learning_rate; are replies in the data truncated (data.max_length)?"
        return Finding("endings", evidence, meaning, action)
    meaning = "the limit is too low for these replies, or the model has not learned to end them"
    return Finding("endings", evidence, meaning, "raise evaluate.max_new_tokens, or train longer")


CURVE_DIAGNOSTICS: tuple[Callable[[RunCurves], Finding | None], ...] = (
    _training_loss,
    _held_out,
    _gradients,
    _endings,
)
