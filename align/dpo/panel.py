"""DPO diagnostics after training: chosen log-probability drop, KL, overfitting, length and repetition.

Known from user reports and papers: the chosen log-probability falls (arXiv 2402.13228, 2404.19733),
completions grow longer (arXiv 2403.19159), a policy that has memorized its pairs keeps drifting. Pure
functions of metrics and texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from align.preference.finding import Finding, repetition

CHOSEN_FELL = 0.05
"""Nats per token: a completion of 50 tokens is then 12 times less likely than before training."""
FAR = 2.0
"""KL (k2) per token: tokens are e^2 = 7 times more or less likely than under the reference. Rejected ones
should become so, short ones fast: healthy runs reach half of this."""
LONGER_CHOSEN = 1.2
"""Chosen to rejected tokens: above this ratio length alone separates most pairs."""
LONGER_REPLIES = 1.3
"""Ratio of completion lengths in words, after to before training."""
LEARNT_BY_HEART = 0.995
"""Training accuracy in the last steps above which no pair is left to learn from."""
KNOWN, OVERFIT = 0.9, 0.1
"""From this training accuracy on, held-out accuracy should not be lower by more than this gap."""
NO_MARGIN, NO_ACCURACY = 0.02, 0.05
"""Increases of implicit reward margin and accuracy below which nothing was learned."""
WORSE = 0.005
"""Relative increase of held-out loss that is reported; less is noise with a few dozen pairs."""

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs of the diagnostics.

    Attributes:
        metrics: those of run.json, ``..._before`` and ``..._after``, with held-out ones if there are any.
        length_ratio: chosen to rejected tokens in the training data.
        completions: completions of some prompts, before and after training.
        has_nll_term: whether the loss has an NLL term on the chosen completions.
    """

    metrics: Numbers
    length_ratio: float
    replies: Sequence[tuple[str, str]]
    likelihood: bool

    def both_ends(self, what: str) -> tuple[float, float] | None:
        """Return a metric before and after training: held-out, else that of the first and the last steps."""
        for start in ("held_out_", ""):
            names = [f"{start}{what}_{when}" for when in ("before", "after")]
            if all(name in self.metrics for name in names):
                return self.metrics[names[0]], self.metrics[names[1]]
        return None


def findings(seen: Seen) -> list[Finding]:
    """Return the findings of a run, in the order of the report."""
    return [found for look in LOOKS if (found := look(seen)) is not None]


def _drift(metrics: Numbers, which: str) -> float | None:
    """Return the change of log-probability per token: on held-out completions if there are any."""
    before, after = (metrics.get(f"held_out_{which}_logps_{when}") for when in ("before", "after"))
    if before is not None and after is not None:
        return after - before
    # Without held-out pairs: the log-ratio to the reference, which is the policy before training.
    return metrics.get(f"{which}_drift_after")


def _learning(seen: Seen) -> Finding | None:
    margins = seen.both_ends("margin")
    accuracies = seen.both_ends("accuracy")
    if margins is None or accuracies is None:
        return None
    (first, last), (before, after) = margins, accuracies
    said = f"margin {first:.3f} → {last:.3f}, accuracy {before:.0%} → {after:.0%}"
    if last - first < NO_MARGIN and after - before < NO_ACCURACY:
        action = "raise train.learning_rate, or train longer"
        return Finding("learning", said, "almost nothing was learned", action)
    return Finding("learning", said, "the policy prefers chosen over rejected completions more than before")


def _unseen(seen: Seen) -> Finding | None:
    losses = [seen.metrics.get(f"held_out_loss_{when}") for when in ("before", "after")]
    if losses[0] is None or losses[1] is None or losses[1] - losses[0] <= WORSE * abs(losses[0]):
        return None
    said = f"held-out loss {losses[0]:.4f} → {losses[1]:.4f}"
    means = "held-out loss increased: the policy is more confident where it is wrong (overfitting)"
    return Finding(
        "unseen pairs", said, means, "lower train.learning_rate, fewer train.epochs, or more pairs"
    )


def _chosen(seen: Seen) -> Finding | None:
    chosen, rejected = (_drift(seen.metrics, which) for which in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return None
    said = f"log-probability per token: chosen {chosen:+.3f}, rejected {rejected:+.3f} nats"
    if chosen >= -CHOSEN_FELL:
        return Finding("likelihood", said, "chosen completions are as likely as before, or more")
    means = "chosen completions became less likely, by more per token than rejected ones"
    if rejected < chosen:
        means = "both became less likely, rejected ones more: probability mass moved to text outside the data"
    more = "raise align.loss.nll_weight" if seen.likelihood else "align.loss={name: rpo} adds an NLL term"
    return Finding(
        "likelihood", said, means, f"{more}; or raise align.loss.beta, or lower train.learning_rate"
    )


def _distance(seen: Seen) -> Finding | None:
    held_out = seen.metrics.get("held_out_kl_after")
    found = held_out if held_out is not None else seen.metrics.get("kl_after")
    if found is None or found < FAR:
        return None
    said, means = (
        f"KL to the reference {found:.2f} per token (k2)",
        "far from the reference: other abilities may be lost",
    )
    return Finding(
        "distance", said, means, "raise align.loss.beta, lower train.learning_rate, or train.epochs=1"
    )


def _by_heart(seen: Seen) -> Finding | None:
    learnt, unseen = seen.metrics.get("accuracy_after"), seen.metrics.get("held_out_accuracy_after")
    if learnt is None:
        return None
    apart = 0.0 if unseen is None else learnt - unseen
    said = f"accuracy {learnt:.1%} in training" + ("" if unseen is None else f", {unseen:.1%} held out")
    action = "fewer train.epochs or more pairs; align.loss=ipo or cdpo lets margins stop growing"
    if apart > OVERFIT and learnt >= KNOWN:
        return Finding("overfit", said, "training pairs are memorized and do not generalize", action)
    if learnt >= LEARNT_BY_HEART:
        means = "every training pair is ranked correctly: further steps only widen the margins"
        return Finding("saturated", said, means, action)
    return None


def _length(seen: Seen) -> Finding | None:
    before, after = (sum(len(pair[when].split()) for pair in seen.replies) for when in (0, 1))
    growth = after / before if before else 1.0
    told = f"chosen/rejected length ratio in the data {seen.length_ratio:.2f}"
    said = f"{told}, completion length after/before {growth:.2f}" if seen.replies else told
    if growth > LONGER_REPLIES and seen.length_ratio > 1:
        action = "align.loss=simpo is length-normalized; or balance the lengths in the data"
        return Finding("length", said, "the policy learned that longer is better", action)
    if growth > LONGER_REPLIES:
        action = "look at samples.jsonl: do completions still end with EOS? raise align.loss.beta"
        return Finding("length", said, "completions grew longer, but not because of the data", action)
    if seen.length_ratio > LONGER_CHOSEN:
        action = "watch completion length; align.loss=simpo is length-normalized"
        return Finding("length", said, "length alone separates most pairs", action)
    return None


def _repetition(seen: Seen) -> Finding | None:
    return repetition(seen.replies, "lower train.learning_rate, raise align.loss.beta, or align.loss=rpo")


LOOKS: tuple[Callable[[Seen], Finding | None], ...] = (
    _learning,
    _unseen,
    _chosen,
    _distance,
    _by_heart,
    _length,
    _repetition,
)
