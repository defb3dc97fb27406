"""Diagnostics of a finished PPO run: reward, graders, KL, length, diversity, updates; what to change."""

from collections.abc import Callable, Mapping, Sequence

from align.ppo.stop_rule import GOLD
from align.preference.finding import Finding, repetition

Numbers = Mapping[str, float]
NOTHING = 0.02
"""Rise of the held-out reward (standard deviation 1) below which nothing was learned."""
LOST = 0.05
"""Fall of a grader's mean from which the reward no longer measures what it should."""
FAR = 25.0
"""KL in nats per completion, our choice: proxy and gold reward diverge with the KL, sooner for a smaller
reward model (arXiv 2210.10760)."""
NEGATIVE = -0.05
"""KL in nats per completion below which a negative value is not estimation noise."""
CLIPPED = 0.3
"""Clip fraction above which most of a rollout's updates have no effect."""
LONGER, SHORTER = 1.5, 0.5
EXPLAINED = 0.0


def findings(metrics: Numbers, replies: Sequence[tuple[str, str]]) -> list[Finding]:
    """Return the findings of a run, most important first.

    Args:
        metrics: the metrics of run.json.
        completions: pairs of completions of the same prompt, before and after training.
    """
    found = [look(metrics) for look in LOOKS]
    found.append(repetition(replies, "raise ppo.kl_coefficient, lower train.learning_rate, or train shorter"))
    return [finding for finding in found if finding is not None]


def _both(metrics: Numbers, what: str) -> tuple[float, float] | None:
    """Return a held-out metric before and after training."""
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
        return Finding("reward", said, "almost nothing was learned", action)
    return Finding("reward", said, "the policy learned to get reward")


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
        action = "raise ppo.kl_coefficient, train shorter, or train the reward model on more comparisons"
        return Finding("graders", said, "a grader outside the reward scores the replies lower", action)
    if all(after > before + LOST for _, before, after in changes):
        return Finding("graders", said, "graders outside the reward score the replies higher")
    return Finding("graders", said, "graders outside the reward changed little")


def _distance(metrics: Numbers) -> Finding | None:
    ends = _both(metrics, "kl")
    if ends is None:
        return None
    after = ends[1]
    said = f"{after:.2f} nats per completion from the reference"
    if after < NEGATIVE:
        means = "a KL is never negative: sampling distribution and log-probabilities do not match"
        return Finding("KL", said, means, "this is a bug: please report it with the run's recipe.yaml")
    if after > FAR:
        means = "large: a reward model is not reliable this far from its training data"
        return Finding("KL", said, means, "raise ppo.kl_coefficient, or ppo.kl_target=6")
    return Finding("KL", said, "small enough for a reward model to be reliable")


def _fluency(metrics: Numbers) -> Finding | None:
    ends = _both(metrics, "perplexity")
    if ends is None:
        return None
    before, after = ends
    said = f"perplexity of the replies under the reference {before:.2f} → {after:.2f}"
    if after > 3 * before:
        return Finding("fluency", said, "unlikely text under the reference", "raise ppo.kl_coefficient")
    return Finding("fluency", said, "likely text under the reference")


def _length(metrics: Numbers) -> Finding | None:
    ends, stopped = _both(metrics, "length"), _both(metrics, "ends")
    if ends is None or stopped is None:
        return None
    before, after = ends
    said = f"{before:.1f} → {after:.1f} tokens, {stopped[0]:.0%} → {stopped[1]:.0%} end with EOS"
    if stopped[1] < stopped[0] - 0.1:
        action = "ppo.missing_end=-1 (or lower), or raise sampling.max_new_tokens"
        return Finding("length", said, "the policy unlearns to end with EOS", action)
    if after > LONGER * before:
        return Finding("length", said, "replies got longer", "reward.length_penalty=0.01, or stop.longer=1.5")
    if after < SHORTER * before:
        means = "replies got much shorter: check in samples.jsonl that they still answer"
        return Finding("length", said, means, "raise ppo.kl_coefficient, or reward longer replies")
    return Finding("length", said, "about as long as before")


def _variety(metrics: Numbers) -> Finding | None:
    ends, distinct = _both(metrics, "entropy"), _both(metrics, "distinct")
    if ends is None or distinct is None:
        return None
    said = (
        f"entropy {ends[0]:.3f} → {ends[1]:.3f} nats per token, "
        f"{distinct[0]:.0%} → {distinct[1]:.0%} of the replies are unique"
    )
    if distinct[1] < 0.5 * distinct[0]:
        means = "the policy gives the same replies over and over (mode collapse)"
        return Finding("variety", said, means, "raise ppo.kl_coefficient, or ppo.entropy_coefficient=0.01")
    return Finding("variety", said, "lower, as expected in RL" if ends[1] < ends[0] else "not lower")


def _updates(metrics: Numbers) -> Finding | None:
    clipped, explained = metrics.get("clipped_after"), metrics.get("explained_variance_after")
    if clipped is None or explained is None:
        return None
    said = f"clip fraction {clipped:.1%}, explained variance of the value {explained:.0%}"
    if clipped > CLIPPED:
        return Finding("updates", said, "updates are too large", "lower train.learning_rate or ppo.epochs")
    if explained < EXPLAINED:
        means = "the value model predicts worse than a constant"
        return Finding("updates", said, means, "raise ppo.value_coefficient or ppo.value_learning_rate")
    return Finding("updates", said, "updates within bounds, and the value model predicts the returns")


LOOKS: tuple[Callable[[Numbers], Finding | None], ...] = (
    _reward,
    _gold,
    _distance,
    _fluency,
    _length,
    _variety,
    _updates,
)
