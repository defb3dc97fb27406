"""DPO's metrics, and diagnostics after training: log-probability drop, KL, overfitting, length, repetition.

Known from user reports and papers: the chosen log-probability falls (arXiv 2402.13228, 2404.19733),
completions grow longer (arXiv 2403.19159), a policy that has memorized its pairs keeps drifting. Pure
functions of metrics and texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune.evaluation.small_samples import FEW_CASES, describe_sample, is_conclusive, wilson_interval
from finetune.training.findings import Finding, repetition_finding
from finetune.training.metric_specs import MetricSpec
from finetune.training.metrics import EVAL_PREFIX

DPO_CURVES = {
    "loss": "training loss (mean per group)",
    "rewards/margins": "implicit reward margin",
    "rewards/accuracies": "reward accuracy (tie: 1/2)",
    "logps/chosen": "chosen log-probability (nats per token)",
    "logps/rejected": "rejected log-probability (nats per token)",
    "logratios/chosen": "chosen log-ratio to the reference (nats per token)",
    "logratios/rejected": "rejected log-ratio to the reference (nats per token)",
    "objective/kl_per_token": "KL to the reference (k2 on the data, nats per token)",
    "data/length_ratio": "chosen/rejected length ratio",
}
HELD_OUT_CURVES = {f"{EVAL_PREFIX}{name}": f"held-out {title}" for name, title in DPO_CURVES.items()}

DPO_METRICS = MetricSpec(
    curves={**DPO_CURVES, **HELD_OUT_CURVES},
    summary={
        "loss": ("training loss", ".4f"),
        "eval/loss": ("held-out loss", ".4f"),
        "eval/rewards/accuracies": ("held-out accuracy", ".1%"),
        "eval/rewards/margins": ("held-out margin", ".3f"),
        "eval/logps/chosen": ("held-out chosen log-probability per token", ".3f"),
        "eval/logps/rejected": ("held-out rejected log-probability per token", ".3f"),
    },
    first_last=(
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "logratios/chosen",
        "logratios/rejected",
        "objective/kl_per_token",
    ),
)

MAX_CHOSEN_DROP = 0.05
"""Nats per token: a completion of 50 tokens is then 12 times less likely than before training."""
LARGE_KL = 2.0
"""KL (k2) per token: tokens are e^2 = 7 times more or less likely than under the reference. Rejected
completions should become less likely, and short ones do so quickly: healthy runs reach half of this."""
LARGE_DATA_LENGTH_RATIO = 1.2
"""Chosen to rejected tokens: above this ratio length alone separates most pairs."""
LARGE_COMPLETION_LENGTH_RATIO, SMALL_COMPLETION_LENGTH_RATIO = 1.3, 0.5
"""Ratio of completion lengths in words, after to before training."""
SATURATED_ACCURACY = 0.995
"""Training accuracy in the last steps above which no pair is left to learn from."""
HIGH_ACCURACY, MAX_ACCURACY_GAP = 0.9, 0.1
"""From this training accuracy on, held-out accuracy should not be lower by more than this gap."""
MIN_MARGIN_GAIN, MIN_ACCURACY_GAIN = 0.02, 0.05
"""Increases of implicit reward margin and accuracy below which nothing was learned."""
MIN_LOGP_CHANGE = 0.01
"""Nats per token below which a log-probability has not changed."""

DPOMetricValues = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class DiagnosticInputs:
    """Inputs of the diagnostics.

    Attributes:
        metrics: those of run.json, ``..._before`` and ``..._after``, with held-out ones if there are any.
        length_ratio: chosen to rejected tokens in the training data.
        completions: completions of some prompts, before and after training.
        has_nll_term: whether the loss has an NLL term on the chosen completions.
        num_held_out: held-out pairs (or lists); 0: the metrics are those of training.
    """

    metrics: DPOMetricValues
    length_ratio: float
    completions: Sequence[tuple[str, str]]
    has_nll_term: bool
    num_held_out: int = 0

    def before_and_after(self, metric: str) -> tuple[float, float] | None:
        """Return a metric before and after training: held-out, else that of the first and the last steps."""
        for prefix in (EVAL_PREFIX, ""):
            names = [f"{prefix}{metric}_{when}" for when in ("before", "after")]
            if all(name in self.metrics for name in names):
                return self.metrics[names[0]], self.metrics[names[1]]
        return None


def diagnose_dpo(inputs: DiagnosticInputs) -> list[Finding]:
    """Return the findings of a run, in the order of the report."""
    return [finding for diagnostic in DPO_DIAGNOSTICS if (finding := diagnostic(inputs)) is not None]


def _logp_change(metrics: DPOMetricValues, side: str) -> float | None:
    """Return the change of log-probability per token: on held-out completions if there are any."""
    before, after = (metrics.get(f"eval/logps/{side}_{when}") for when in ("before", "after"))
    if before is not None and after is not None:
        return after - before
    # Without held-out pairs: the log-ratio to the reference, which is the policy before training.
    return metrics.get(f"logratios/{side}_after")


def _has_moved(metrics: DPOMetricValues) -> bool:
    """Return whether training changed the log-probabilities of completions."""
    changes = [_logp_change(metrics, side) for side in ("chosen", "rejected")]
    return any(change is not None and abs(change) >= MIN_LOGP_CHANGE for change in changes)


def _learning(inputs: DiagnosticInputs) -> Finding | None:
    margins = inputs.before_and_after("rewards/margins")
    accuracies = inputs.before_and_after("rewards/accuracies")
    if margins is None or accuracies is None:
        return None
    (first, last), (before, after) = margins, accuracies
    evidence = f"margin {first:z.3f} → {last:z.3f}, accuracy {before:.0%} → {after:.0%}"
    margin_gain, accuracy_gain = last - first, after - before
    if count := inputs.num_held_out:
        evidence = f"{evidence} on {describe_sample(before, after, count)}"
        if count < FEW_CASES and not is_conclusive(before, after, count):
            meaning = "too few held-out pairs to tell whether chosen completions gained"
            return Finding("learning", evidence.removesuffix(", too few to tell"), meaning)
    # The margin decides, which every pair changes: accuracy counts the pairs whose sign changed.
    if margin_gain <= -MIN_MARGIN_GAIN or (
        accuracy_gain <= -MIN_ACCURACY_GAIN and margin_gain < MIN_MARGIN_GAIN
    ):
        meaning = "the policy prefers rejected over chosen completions more than before"
        action = "lower train.learning_rate; are `chosen` and `rejected` exchanged in some rows?"
        return Finding("learning", evidence, meaning, action)
    # With log-probabilities that hardly changed, accuracy counts signs of rounding errors.
    if margin_gain < MIN_MARGIN_GAIN and (
        accuracy_gain < MIN_ACCURACY_GAIN or not _has_moved(inputs.metrics)
    ):
        action = "raise train.learning_rate, or train longer"
        return Finding("learning", evidence, "almost nothing was learned", action)
    return Finding(
        "learning", evidence, "the policy prefers chosen over rejected completions more than before"
    )


def _margin_gain(inputs: DiagnosticInputs) -> float:
    """Return the increase of the training pairs' margin, which is 0 before training."""
    return inputs.metrics.get("rewards/margins_after", 0.0)


def _chosen_logp_drop(inputs: DiagnosticInputs) -> Finding | None:
    chosen, rejected = (_logp_change(inputs.metrics, side) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return None
    evidence = f"log-probability per token: chosen {chosen:+.3f}, rejected {rejected:+.3f} nats"
    if chosen >= -MAX_CHOSEN_DROP:
        return Finding("likelihood", evidence, "chosen completions are as likely as before, or more")
    if rejected > 0:
        meaning = "chosen completions became less likely, and rejected ones more likely"
        action = "lower train.learning_rate; are `chosen` and `rejected` exchanged in some rows?"
        return Finding("likelihood", evidence, meaning, action)
    meaning = "both became less likely, chosen ones by more per token"
    if rejected < chosen:
        meaning = (
            "both became less likely, rejected ones more: probability mass moved to text outside the data"
        )
    nll_action = (
        "raise dpo.loss.nll_weight" if inputs.has_nll_term else "dpo.loss={name: rpo} adds an NLL term"
    )
    return Finding(
        "likelihood",
        evidence,
        meaning,
        f"{nll_action}; or raise dpo.loss.beta, or lower train.learning_rate",
    )


def _large_kl(inputs: DiagnosticInputs) -> Finding | None:
    held_out = inputs.metrics.get("eval/objective/kl_per_token_after")
    kl = held_out if held_out is not None else inputs.metrics.get("objective/kl_per_token_after")
    if kl is None or kl < LARGE_KL:
        return None
    evidence, meaning = (
        f"KL to the reference {kl:.2f} per token (k2)",
        "far from the reference: other abilities may be lost",
    )
    return Finding(
        "distance", evidence, meaning, "raise dpo.loss.beta, lower train.learning_rate, or fewer train.epochs"
    )


def _overfitting(inputs: DiagnosticInputs) -> Finding | None:
    train_accuracy, held_out_accuracy = (
        inputs.metrics.get("rewards/accuracies_after"),
        inputs.metrics.get("eval/rewards/accuracies_after"),
    )
    if train_accuracy is None:
        return None
    gap = 0.0 if held_out_accuracy is None else train_accuracy - held_out_accuracy
    # A small sample may be below the training accuracy by chance.
    if held_out_accuracy is not None and inputs.num_held_out:
        _, highest = wilson_interval(held_out_accuracy, inputs.num_held_out)
        gap = gap if train_accuracy > highest else 0.0
    evidence = f"accuracy {train_accuracy:.1%} in training" + (
        "" if held_out_accuracy is None else f", {held_out_accuracy:.1%} held out"
    )
    if gap > MAX_ACCURACY_GAP and train_accuracy >= HIGH_ACCURACY:
        action = "fewer train.epochs, lower train.learning_rate, or more pairs"
        return Finding("overfit", evidence, "training pairs are memorized and do not generalize", action)
    # With a margin of nearly 0 nothing was learned yet, however many pairs have the right sign.
    if train_accuracy >= SATURATED_ACCURACY and _margin_gain(inputs) >= MIN_MARGIN_GAIN:
        meaning = "every training pair is ranked correctly: further steps only widen the margins"
        action = "fewer train.epochs; dpo.loss=ipo or cdpo lets margins stop growing"
        return Finding("saturated", evidence, meaning, action)
    return None


def _length_growth(inputs: DiagnosticInputs) -> Finding | None:
    before, after = (sum(len(pair[when].split()) for pair in inputs.completions) for when in (0, 1))
    growth = after / before if before else 1.0
    data_evidence = f"chosen/rejected length ratio in the data {inputs.length_ratio:.2f}"
    evidence = (
        f"{data_evidence}, completion length after/before {growth:.2f}"
        if inputs.completions
        else data_evidence
    )
    if growth > LARGE_COMPLETION_LENGTH_RATIO and inputs.length_ratio > 1:
        action = "balance the lengths in the data"
        return Finding("length", evidence, "the policy learned that longer is better", action)
    if growth > LARGE_COMPLETION_LENGTH_RATIO:
        action = "look at samples.jsonl: do completions still end with EOS? lower train.learning_rate"
        return Finding("length", evidence, "completions grew longer, but not because of the data", action)
    if growth < SMALL_COMPLETION_LENGTH_RATIO:
        meaning, action = "completions grew shorter", "raise dpo.loss.beta"
        if inputs.length_ratio < 1:
            meaning = "the policy learned that shorter is better"
            action += ", or balance the lengths in the data"
        return Finding("length", evidence, meaning, action)
    if not 1 / LARGE_DATA_LENGTH_RATIO <= inputs.length_ratio <= LARGE_DATA_LENGTH_RATIO:
        action = "watch completion length, or balance the lengths in the data"
        return Finding("length", evidence, "length alone separates most pairs", action)
    return None


def _repetition(inputs: DiagnosticInputs) -> Finding | None:
    return repetition_finding(inputs.completions, "lower train.learning_rate, or dpo.loss=rpo")


DPO_DIAGNOSTICS: tuple[Callable[[DiagnosticInputs], Finding | None], ...] = (
    _learning,
    _chosen_logp_drop,
    _large_kl,
    _overfitting,
    _length_growth,
    _repetition,
)
