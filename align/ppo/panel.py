"""What happened to a policy while it learnt from rewards: what is normal, what is not, what to do then."""

from collections.abc import Callable, Mapping, Sequence

from align.ppo.stop_rule import GOLD
from align.preference.finding import Finding, repetition

Numbers = Mapping[str, float]
NOTHING = 0.02
"""What a reward of deviation 1 has risen by at most where nothing was learnt."""
LOST = 0.05
"""What a judge's mean has fallen by where the reward is not what it stands for."""
FAR = 25.0
"""Nats a reply, our choice: a learnt reward and the true one part ways with the distance, the sooner the
smaller the reward model (arXiv 2210.10760)."""
NEGATIVE = -0.05
"""Nats a reply below which a distance is not the noise of its estimate."""
CLIPPED = 0.3
"""Share of clipped tokens from which most of a rollout's updates change nothing."""
LONGER, SHORTER = 1.5, 0.5
EXPLAINED = 0.0


def findings(metrics: Numbers, replies: Sequence[tuple[str, str]]) -> list[Finding]:
    """Return what can be said of a run, in the order in which a reader asks.

    Args:
        metrics: run.json's.
        replies: to some prompts, before and after.
    """
    found = [look(metrics) for look in LOOKS]
    found.append(repetition(replies, "raise ppo.kl_coefficient, lower train.learning_rate, or train shorter"))
    return [finding for finding in found if finding is not None]


def _both(metrics: Numbers, what: str) -> tuple[float, float] | None:
    """Return a held-out measure before and after."""
    names = [f"held_out_{what}_{when}" for when in ("before", "after")]
    if any(name not in metrics for name in names):
        return None
    return metrics[names[0]], metrics[names[1]]


def _reward(metrics: Numbers) -> Finding | None:
    ends = _both(metrics, "reward")
    if ends is None:
        return None
    before, after = ends
    said = f"held-out {before:.3f} → {after:.3f}"
    if after - before < NOTHING:
        action = "raise train.learning_rate, lower ppo.kl_coefficient, or train longer"
        return Finding("reward", said, "next to nothing was learnt", action)
    return Finding("reward", said, "the policy learnt what is rewarded")


def _gold(metrics: Numbers) -> Finding | None:
    names = [name for name in metrics if name.startswith(f"held_out_{GOLD}") and name.endswith("_before")]
    changes = []
    for name in names:
        what = name.removeprefix("held_out_").removesuffix("_before")
        before, after = metrics[name], metrics[f"held_out_{what}_after"]
        changes.append((what.removeprefix(GOLD), before, after))
    if not changes:
        return None
    said = "; ".join(f"{name} {before:.3f} → {after:.3f}" for name, before, after in changes)
    if any(after < before - LOST for _, before, after in changes):
        action = "raise ppo.kl_coefficient, train shorter, or learn the reward from more comparisons"
        return Finding("judges", said, "a judge that the run does not see likes the replies less", action)
    if all(after > before + LOST for _, before, after in changes):
        return Finding("judges", said, "judges that the run does not see like the replies better")
    return Finding("judges", said, "judges that the run does not see notice little")


def _distance(metrics: Numbers) -> Finding | None:
    ends = _both(metrics, "kl")
    if ends is None:
        return None
    after = ends[1]
    said = f"{after:.2f} nats a reply from the start"
    if after < NEGATIVE:
        means = "a distance is never negative: replies are not drawn from what the log-probabilities assume"
        return Finding("distance", said, means, "this is a fault: report it with the run's recipe.yaml")
    if after > FAR:
        means = "far: a learnt reward is not to be trusted there"
        return Finding("distance", said, means, "raise ppo.kl_coefficient, or ppo.kl_target=6")
    return Finding("distance", said, "near enough for a learnt reward to mean something")


def _fluency(metrics: Numbers) -> Finding | None:
    ends = _both(metrics, "perplexity")
    if ends is None:
        return None
    before, after = ends
    said = f"perplexity of the replies under the start {before:.2f} → {after:.2f}"
    if after > 3 * before:
        return Finding("fluency", said, "text that the start would not write", "raise ppo.kl_coefficient")
    return Finding("fluency", said, "text as the start would write it")


def _length(metrics: Numbers) -> Finding | None:
    ends, stopped = _both(metrics, "length"), _both(metrics, "ends")
    if ends is None or stopped is None:
        return None
    before, after = ends
    said = f"{before:.1f} → {after:.1f} tokens a reply, {stopped[0]:.0%} → {stopped[1]:.0%} end by themselves"
    if stopped[1] < stopped[0] - 0.1:
        action = "ppo.missing_end=-1 (or lower), or raise sampling.max_new_tokens"
        return Finding("length", said, "the policy forgets how to end", action)
    if after > LONGER * before:
        return Finding("length", said, "replies grew", "reward.length_penalty=0.01, or stop.longer=1.5")
    if after < SHORTER * before:
        means = "replies shrank: look at samples.jsonl whether they still say anything"
        return Finding("length", said, means, "raise ppo.kl_coefficient, or a reward that wants more")
    return Finding("length", said, "as long as before, about")


def _variety(metrics: Numbers) -> Finding | None:
    ends, distinct = _both(metrics, "entropy"), _both(metrics, "distinct")
    if ends is None or distinct is None:
        return None
    said = (
        f"entropy {ends[0]:.3f} → {ends[1]:.3f} nats a token, "
        f"{distinct[0]:.0%} → {distinct[1]:.0%} of the replies differ"
    )
    if distinct[1] < 0.5 * distinct[0]:
        means = "the policy gives the same replies again and again"
        return Finding("variety", said, means, "raise ppo.kl_coefficient, or ppo.entropy_coefficient=0.01")
    return Finding("variety", said, "lower, as rewards make it" if ends[1] < ends[0] else "not lower")


def _updates(metrics: Numbers) -> Finding | None:
    clipped, explained = metrics.get("clipped_after"), metrics.get("explained_variance_after")
    if clipped is None or explained is None:
        return None
    said = f"{clipped:.1%} of the tokens clipped, {explained:.0%} of the returns' variance foretold"
    if clipped > CLIPPED:
        return Finding("updates", said, "steps go too far", "lower train.learning_rate or ppo.epochs")
    if explained < EXPLAINED:
        means = "the value does worse than a constant"
        return Finding("updates", said, means, "raise ppo.value_coefficient or ppo.value_learning_rate")
    return Finding("updates", said, "steps within bounds, and a value that knows something")


LOOKS: tuple[Callable[[Numbers], Finding | None], ...] = (
    _reward,
    _gold,
    _distance,
    _fluency,
    _length,
    _variety,
    _updates,
)
