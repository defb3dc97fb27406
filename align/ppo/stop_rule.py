"""Early stopping of PPO: entropy and EOS collapse, KL, length hacking, reward over-optimization."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.ppo.settings import Settings, StopSettings
from align.ppo.state import PPOState
from finetune.distributed import collectives
from finetune.training.context import RunContext
from finetune.training.metrics import EVAL_PREFIX, GOLD_PREFIX

MIN_LENGTH_REWARD_CORRELATION = 0.3
"""Correlation of length and reward above which longer completions count as length hacking."""

Metrics = Mapping[str, float]


def stop_reason(first: Metrics, current: Metrics, rules: StopSettings) -> str:
    """Return the reason to stop, from the metrics of the first and the current rollout; empty to continue.

    >>> rules, sound = StopSettings(), {
    ...     "objective/kl_per_completion": 1.0, "policy/entropy": 2.0, "val/eos_rate": 1.0,
    ...     "val/completion_length": 9.0,
    ... }
    >>> stop_reason(sound, sound, rules)
    ''
    >>> stop_reason(sound, {**sound, "policy/entropy": 0.01}, rules).split(',')[0]
    'collapsed: entropy fell from 2.000 to 0.010 nats per token'
    """
    if (
        rules.min_entropy_ratio is not None
        and current["policy/entropy"] < rules.min_entropy_ratio * first["policy/entropy"]
    ):
        change = f"from {first['policy/entropy']:.3f} to {current['policy/entropy']:.3f} nats per token"
        bound = f"stop.min_entropy_ratio ({rules.min_entropy_ratio:g})"
        return f"collapsed: entropy fell {change}, below {bound} of the start"
    # A policy that never ended with EOS has not collapsed: the rate must have been above the bound.
    if (
        rules.min_eos_rate is not None
        and current["val/eos_rate"] < rules.min_eos_rate <= first["val/eos_rate"]
    ):
        now, before = current["val/eos_rate"], first["val/eos_rate"]
        eos_rates = f"{now:.1%} of the completions end with EOS, {before:.1%} did at the start"
        return f"collapsed: {eos_rates} (stop.min_eos_rate {rules.min_eos_rate:g})"
    if rules.max_kl is not None and current["objective/kl_per_completion"] > rules.max_kl:
        kl = f"{current['objective/kl_per_completion']:.2f} nats per completion"
        return f"KL to the reference: {kl}, above stop.max_kl ({rules.max_kl:g})"
    # Longer completions alone are no hacking: length itself must be rewarded.
    is_longer = (
        rules.max_length_ratio is not None
        and current["val/completion_length"] > rules.max_length_ratio * first["val/completion_length"]
    )
    if is_longer and current["val/length_reward_corr"] > MIN_LENGTH_REWARD_CORRELATION:
        growth = f"from {first['val/completion_length']:.1f} to {current['val/completion_length']:.1f} tokens"
        correlation = f"length and reward correlate with r = {current['val/length_reward_corr']:.2f}"
        bound = f"stop.max_length_ratio {rules.max_length_ratio:g}"
        return f"length hacking: completions grew {growth}, and {correlation} ({bound})"
    return ""


def over_optimization_reason(history: Sequence[Metrics], rules: StopSettings) -> str:
    """Return the reason to stop for reward over-optimization, or an empty string.

    Gao, Schulman and Hilton 2022 (arXiv 2210.10760): the proxy reward rises while the gold reward falls.

    Args:
        history: held-out metrics, from before training to now.
        rules: ``max_gold_drop`` is how far a grader's mean may fall below its best.
    """
    current = history[-1]
    if rules.max_gold_drop is None:
        return ""
    for name in (name for name in current if name.startswith(GOLD_PREFIX)):
        best = max(history, key=lambda entry: entry[name])
        # Against its best, not the start: grader and reward may first rise together.
        if (
            best[name] - current[name] > rules.max_gold_drop
            and current["objective/reward"] > best["objective/reward"]
        ):
            grader_change = (
                f"grader '{name.removeprefix(GOLD_PREFIX)}' fell from {best[name]:.3f} to {current[name]:.3f}"
            )
            reward_change = (
                f"the reward rose from {best['objective/reward']:.3f} to {current['objective/reward']:.3f}"
            )
            rule = f"stop.max_gold_drop {rules.max_gold_drop:g}"
            return f"over-optimized: {grader_change} while {reward_change} ({rule})"
    return ""


class RewardHackingStop(TrainerCallback):  # type: ignore[misc]
    """Stops training on reward hacking or collapse, after a rollout or a held-out evaluation."""

    def __init__(self, ctx: RunContext[Settings], ppo_state: PPOState) -> None:
        """Set up the callback; ``ppo_state`` has the metrics of the first rollout."""
        self.ctx, self.ppo_state, self.rules = ctx, ppo_state, ctx.settings.stop
        self.is_stopped = False

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
        if logs and "objective/kl_coef" in logs:
            self._stop(stop_reason(self.ppo_state.first_metrics, logs, self.rules), state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the held-out metrics."""
        self._stop(over_optimization_reason(self._held_out_history(), self.rules), state, control)

    def _stop(self, reason: str, state: TrainerState, control: TrainerControl) -> None:
        # After the last step nothing is left to stop. A signal at this step is no such case: the run must not
        # resume after it.
        if reason and not self.is_stopped and state.global_step < state.max_steps:
            self.is_stopped = True
            # No checkpoint at this step: a run that is killed here resumes from an earlier one, measures
            # the same and stops again.
            control.should_training_stop, control.should_save = True, False
            message = f"stopped at step {state.global_step}: {reason}"
            self.ctx.log(message)
            self.ctx.run.update(stop_reason=message)

    def _held_out_history(self) -> list[Metrics]:
        """Return all held-out metrics so far, from before training on, as read by rank 0."""
        # Only rank 0 has the metrics file, and all ranks must agree on whether to stop.
        return collectives.broadcast_object(self._recorded_history() if self.ctx.dist.is_main else [])

    def _recorded_history(self) -> list[Metrics]:
        run = self.ctx.run
        metrics = run.record["metrics"]
        # The metrics before training are in run.json alone; metrics.jsonl has those of evaluations since.
        before = {name.removesuffix("_before"): value for name, value in metrics.items() if "_before" in name}
        entries = [
            before,
            *(entry for entry in run.metrics() if f"{EVAL_PREFIX}objective/reward" in entry),
        ]
        return [{name.removeprefix(EVAL_PREFIX): value for name, value in entry.items()} for entry in entries]
