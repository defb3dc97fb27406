"""What happened to the policy while it learnt preferences: what is normal, what is not, what to do about it.

Known from users' threads and from papers: the chosen completions' likelihood falls (arXiv 2402.13228,
2404.19733), replies grow longer (arXiv 2403.19159), a model that knows its pairs by heart drifts on. Pure
functions of numbers and texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from align.preference.finding import Finding, repetition

CHOSEN_FELL = 0.05
"""Nats per token: a reply of 50 tokens is then 12 times less likely than it was."""
FAR = 2.0
"""Distance (k2) per token: tokens are some e^2 = 7 times likelier or less likely than at the start. Rejected
ones are to become so, short ones fast: half of this is seen in runs that end well."""
LONGER_CHOSEN = 1.2
"""Chosen tokens for a rejected one: from here on length alone tells them apart in most pairs."""
LONGER_REPLIES = 1.3
"""Words of replies after for one before."""
LEARNT_BY_HEART = 0.995
"""Accuracy in the last steps of training at which no pair has anything left to teach."""
KNOWN, OVERFIT = 0.9, 0.1
"""Accuracy in training from which held-out pairs should not stay behind by more than this."""
NO_MARGIN, NO_ACCURACY = 0.02, 0.05
"""What the margin of implicit rewards and the accuracy have grown by at most where nothing was learnt."""
WORSE = 0.005
"""Share by which the held-out loss must have risen to be told: below it is the noise of a few dozen pairs."""

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the panel looks at.

    Attributes:
        metrics: run.json's, ``..._before`` and ``..._after``; held-out ones where there are any.
        length_ratio: tokens of the data's chosen completions for one of the rejected ones.
        replies: to some prompts, before and after.
        likelihood: whether the loss holds the chosen completions' likelihood up.
    """

    metrics: Numbers
    length_ratio: float
    replies: Sequence[tuple[str, str]]
    likelihood: bool

    def both_ends(self, what: str) -> tuple[float, float] | None:
        """Return a measure before and after: held out, or else in the first step and the last ones."""
        for start in ("held_out_", ""):
            names = [f"{start}{what}_{when}" for when in ("before", "after")]
            if all(name in self.metrics for name in names):
                return self.metrics[names[0]], self.metrics[names[1]]
        return None


def findings(seen: Seen) -> list[Finding]:
    """Return what is worth saying, in the order in which a reader wants it."""
    return [found for look in LOOKS if (found := look(seen)) is not None]


def _drift(metrics: Numbers, which: str) -> float | None:
    """Return how the log-probability per token has moved: of held-out completions where there are any."""
    before, after = (metrics.get(f"held_out_{which}_logps_{when}") for when in ("before", "after"))
    if before is not None and after is not None:
        return after - before
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
        return Finding("learning", said, "next to nothing was learnt", action)
    return Finding("learning", said, "chosen completions gained on rejected ones")


def _unseen(seen: Seen) -> Finding | None:
    losses = [seen.metrics.get(f"held_out_loss_{when}") for when in ("before", "after")]
    if losses[0] is None or losses[1] is None or losses[1] - losses[0] <= WORSE * abs(losses[0]):
        return None
    said = f"held-out loss {losses[0]:.4f} → {losses[1]:.4f}"
    means = "on unseen pairs it ends worse than it began: where the policy is wrong it is surer of it"
    return Finding(
        "unseen pairs", said, means, "lower train.learning_rate, fewer train.epochs, or more pairs"
    )


def _chosen(seen: Seen) -> Finding | None:
    chosen, rejected = (_drift(seen.metrics, which) for which in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return None
    said = f"log-probability per token: chosen {chosen:+.3f}, rejected {rejected:+.3f} nats"
    if chosen >= -CHOSEN_FELL:
        return Finding("likelihood", said, "chosen completions are about as likely as before, or more")
    means = "chosen completions became less likely, and more so than rejected ones, token by token"
    if rejected < chosen:
        means = "both became less likely, rejected ones more so: what took their place is in no data"
    more = (
        "raise align.loss.nll_weight" if seen.likelihood else "align.loss={name: rpo} adds their likelihood"
    )
    return Finding(
        "likelihood", said, means, f"{more}; or raise align.loss.beta, or lower train.learning_rate"
    )


def _distance(seen: Seen) -> Finding | None:
    held_out = seen.metrics.get("held_out_kl_after")
    found = held_out if held_out is not None else seen.metrics.get("kl_after")
    if found is None or found < FAR:
        return None
    said, means = (
        f"distance from the start {found:.2f} per token",
        "far from what it was: other skills may be lost",
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
        return Finding("overfit", said, "pairs are known by heart that say little of others", action)
    if learnt >= LEARNT_BY_HEART:
        means = "every pair is told apart: further steps drive both apart and teach nothing"
        return Finding("saturated", said, means, action)
    return None


def _length(seen: Seen) -> Finding | None:
    before, after = (sum(len(pair[when].split()) for pair in seen.replies) for when in (0, 1))
    growth = after / before if before else 1.0
    told = f"chosen tokens for a rejected one in the data {seen.length_ratio:.2f}"
    said = f"{told}, words of a reply after for one before {growth:.2f}" if seen.replies else told
    if growth > LONGER_REPLIES and seen.length_ratio > 1:
        action = "align.loss=simpo compares means over tokens; or even out the lengths in the data"
        return Finding("length", said, "the policy learnt that longer is better", action)
    if growth > LONGER_REPLIES:
        action = "look at samples.jsonl: do replies still end? raise align.loss.beta"
        return Finding("length", said, "replies grew, and not because of the data", action)
    if seen.length_ratio > LONGER_CHOSEN:
        action = "watch the replies' length; align.loss=simpo compares means over tokens"
        return Finding("length", said, "length alone tells most pairs apart", action)
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
