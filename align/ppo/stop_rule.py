"""When a PPO run is not worth going on with, and why: collapse, over-optimisation, length, distance."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.ppo.settings import StopSettings

GOLD = "gold_"
"""What a judge's mean is called among the measures: the true reward, which the run does not maximise."""
LONGER_IS_BETTER = 0.3
"""Correlation of a reply's length with its reward from which growth is the reward's doing."""

Numbers = Mapping[str, float]


def why_stop(first: Numbers, now: Numbers, rules: StopSettings) -> str:
    """Return why a run is to end, from its replies at the start and now; empty where it may go on.

    >>> rules, sound = StopSettings(), {"kl": 1.0, "entropy": 2.0, "ends": 1.0, "length": 9.0}
    >>> why_stop(sound, sound, rules)
    ''
    >>> why_stop(sound, {**sound, "entropy": 0.01}, rules)
    "collapsed: the policy's entropy fell from 2.000 to 0.010 nats a token, below stop.entropy (0.02) of it"
    """
    if rules.entropy is not None and now["entropy"] < rules.entropy * first["entropy"]:
        fell = f"from {first['entropy']:.3f} to {now['entropy']:.3f} nats a token"
        return f"collapsed: the policy's entropy fell {fell}, below stop.entropy ({rules.entropy:g}) of it"
    if rules.ends is not None and now["ends"] < rules.ends <= first["ends"]:
        share = f"{now['ends']:.1%} of its replies end by themselves, {first['ends']:.1%} did"
        return f"collapsed: {share} (stop.ends {rules.ends:g})"
    if rules.kl is not None and now["kl"] > rules.kl:
        return f"too far from the start: {now['kl']:.2f} nats a reply, more than stop.kl ({rules.kl:g})"
    grew = rules.longer is not None and now["length"] > rules.longer * first["length"]
    if grew and now["length_reward"] > LONGER_IS_BETTER:
        tokens = f"from {first['length']:.1f} to {now['length']:.1f} tokens"
        why = f"a reply's length and its reward correlate by {now['length_reward']:.2f}"
        return f"length hacking: replies grew {tokens}, and {why} (stop.longer {rules.longer:g})"
    return ""


def over_optimised(history: Sequence[Numbers], rules: StopSettings) -> str:
    """Return why a run is to end that raises its reward and lowers what the reward stands for.

    Gao, Schulman and Hilton 2022 (arXiv 2210.10760): a learnt reward rises on while the true one falls.

    Args:
        history: the measures of held-out replies, from before training to now.
        rules: how far a judge's mean may fall below its best.
    """
    now = history[-1]
    if rules.gold_falls is None:
        return ""
    for name in (name for name in now if name.startswith(GOLD)):
        best = max(history, key=lambda measures: measures[name])
        if best[name] - now[name] > rules.gold_falls and now["reward"] > best["reward"]:
            judged = f"judge '{name.removeprefix(GOLD)}' fell from {best[name]:.3f} to {now[name]:.3f}"
            learnt = f"the reward rose from {best['reward']:.3f} to {now['reward']:.3f}"
            return f"over-optimised: {judged} while {learnt} (stop.gold_falls {rules.gold_falls:g})"
    return ""


class StopWhenSpoilt(TrainerCallback):  # type: ignore[misc]
    """Ends training for a reason, after a rollout or a held-out measure.

    No checkpoint is written at that step: a run that is killed before it has ended goes on from an earlier
    one, measures the same, and stops again.
    """

    def __init__(
        self,
        rules: StopSettings,
        *,
        first: Callable[[], Numbers],
        history: Callable[[], Sequence[Numbers]],
        tell: Callable[[str], None],
    ) -> None:
        """Bind the rules to the first rollout's measures, to the held-out ones so far, and to who is told."""
        self.rules, self.first, self.history, self.tell = rules, first, history, tell

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at a new rollout."""
        if logs and "kl_coefficient" in logs:
            self._end(why_stop(self.first(), logs, self.rules), state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the held-out replies."""
        self._end(over_optimised(self.history(), self.rules), state, control)

    def _end(self, reason: str, state: TrainerState, control: TrainerControl) -> None:
        if reason and not control.should_training_stop:
            control.should_training_stop, control.should_save = True, False
            self.tell(f"stopped at step {state.global_step}: {reason}")
