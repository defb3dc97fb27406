"""Early stopping of PPO: entropy and EOS collapse, KL, length hacking, reward over-optimization."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.ppo.settings import StopSettings

GOLD = "gold_"
"""Metric prefix of the graders: the gold reward, which the run does not maximize."""
LONGER_IS_BETTER = 0.3
"""Correlation of length and reward above which longer completions count as length hacking."""

Numbers = Mapping[str, float]


def why_stop(first: Numbers, now: Numbers, rules: StopSettings) -> str:
    """Return the reason to stop, from the metrics of the first and the current rollout; empty to continue.

    >>> rules, sound = StopSettings(), {"kl": 1.0, "entropy": 2.0, "ends": 1.0, "length": 9.0}
    >>> why_stop(sound, sound, rules)
    ''
    >>> why_stop(sound, {**sound, "entropy": 0.01}, rules)
    "collapsed: entropy fell from 2.000 to 0.010 nats per token, below stop.entropy (0.02) of the start"
    """
    if rules.entropy is not None and now["entropy"] < rules.entropy * first["entropy"]:
        fell = f"from {first['entropy']:.3f} to {now['entropy']:.3f} nats per token"
        return f"collapsed: entropy fell {fell}, below stop.entropy ({rules.entropy:g}) of the start"
    # A policy that never ended with EOS has not collapsed: the rate must have been above the bound.
    if rules.ends is not None and now["ends"] < rules.ends <= first["ends"]:
        share = f"{now['ends']:.1%} of the completions end with EOS, {first['ends']:.1%} did at the start"
        return f"collapsed: {share} (stop.ends {rules.ends:g})"
    if rules.kl is not None and now["kl"] > rules.kl:
        return f"KL to the reference: {now['kl']:.2f} nats per completion, above stop.kl ({rules.kl:g})"
    # Longer completions alone are no hacking: length itself must be rewarded.
    grew = rules.longer is not None and now["length"] > rules.longer * first["length"]
    if grew and now["length_reward"] > LONGER_IS_BETTER:
        tokens = f"from {first['length']:.1f} to {now['length']:.1f} tokens"
        why = f"length and reward correlate with r = {now['length_reward']:.2f}"
        return f"length hacking: completions grew {tokens}, and {why} (stop.longer {rules.longer:g})"
    return ""


def over_optimised(history: Sequence[Numbers], rules: StopSettings) -> str:
    """Return the reason to stop for reward over-optimization, or an empty string.

    Gao, Schulman and Hilton 2022 (arXiv 2210.10760): the proxy reward rises while the gold reward falls.

    Args:
        history: held-out metrics, from before training to now.
        rules: ``gold_falls`` is how far a grader's mean may fall below its best.
    """
    now = history[-1]
    if rules.gold_falls is None:
        return ""
    for name in (name for name in now if name.startswith(GOLD)):
        best = max(history, key=lambda measures: measures[name])
        # Against its best, not the start: grader and reward may first rise together.
        if best[name] - now[name] > rules.gold_falls and now["reward"] > best["reward"]:
            judged = f"grader '{name.removeprefix(GOLD)}' fell from {best[name]:.3f} to {now[name]:.3f}"
            learnt = f"the reward rose from {best['reward']:.3f} to {now['reward']:.3f}"
            return f"over-optimized: {judged} while {learnt} (stop.gold_falls {rules.gold_falls:g})"
    return ""


class StopWhenSpoilt(TrainerCallback):  # type: ignore[misc]
    """Stops training on reward hacking or collapse, after a rollout or a held-out evaluation."""

    def __init__(
        self,
        rules: StopSettings,
        *,
        first: Callable[[], Numbers],
        history: Callable[[], Sequence[Numbers]],
        tell: Callable[[str], None],
    ) -> None:
        """Set up the callback.

        Args:
            rules: the recipe's stop section.
            first_metrics: returns the metrics of the first rollout.
            history: returns all held-out metrics so far.
            on_stop: receives the reason.
        """
        self.rules, self.first, self.history, self.tell = rules, first, history, tell

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the metrics of a new rollout."""
        # The KL coefficient is logged with a new rollout only.
        if logs and "kl_coefficient" in logs:
            self._end(why_stop(self.first(), logs, self.rules), state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the held-out metrics."""
        self._end(over_optimised(self.history(), self.rules), state, control)

    def _end(self, reason: str, state: TrainerState, control: TrainerControl) -> None:
        if reason and not control.should_training_stop:
            # No checkpoint at this step: a run that is killed here resumes from an earlier one, measures
            # the same and stops again.
            control.should_training_stop, control.should_save = True, False
            self.tell(f"stopped at step {state.global_step}: {reason}")
