"""Checks of the first completions, before the first update: do they end, and is never ending worth less?"""

from collections.abc import Sequence
from math import ceil

from torch import Tensor

from finetune.training.preflight.checks import CheckResult

MIN_EOS_RATE = 0.1
"""EOS rate below which almost no reward is of a complete reply."""
ENDINGS_REPAIR = "raise sampling.max_new_tokens, or start from a model that ends its replies (--from RUN)"


def check_endings(ended_with_eos: Sequence[bool], max_new_tokens: int) -> list[CheckResult]:
    """Check that the first completions end with EOS; empty if they do, a warning if almost none does."""
    num_ended, total = sum(ended_with_eos), len(ended_with_eos)
    if not total or num_ended >= MIN_EOS_RATE * total:
        return []
    detail = f"{num_ended} of the first {total} completions end within {max_new_tokens} tokens"
    return [CheckResult("endings", f"{detail}: {ENDINGS_REPAIR}", warned=True)]


def check_equal_rewards(rewards: Sequence[float], names: Sequence[str]) -> list[CheckResult]:
    """Check that the first completions have different rewards; a warning if all are equal, else empty.

    Args:
        rewards: the total reward of each completion.
        names: the names of the rewards.
    """
    if len(rewards) < 2 or min(rewards) < max(rewards):
        return []
    reward = " and ".join(names)
    detail = (
        f"all {len(rewards)} first completions have reward {rewards[0]:g} ({reward}): nothing to learn from"
    )
    repair = f"check {reward} on the completions in rollouts.jsonl"
    return [CheckResult("equal rewards", f"{detail}; {repair}", warned=True)]


def check_missing_eos_reward(
    rewards_C: Tensor, ended_with_eos_C: Tensor, missing_eos_reward: float | None
) -> list[CheckResult]:
    """Check that never ending is worth less than any ending, on the first rollout; empty if none ends.

    Args:
        rewards_C: (C,) the rewards that are maximized.
        ended_with_eos_C: (C,) bool, whether the completion ended with EOS.
        missing_eos_reward: the reward of completions without EOS; None: their own reward.
    """
    rewards = rewards_C[ended_with_eos_C].double()
    if missing_eos_reward is None or not len(rewards):
        return []
    lowest, num_lower = float(rewards.min()), int((rewards <= missing_eos_reward).sum())
    if not num_lower:
        detail = f"{missing_eos_reward:g} is below the rewards of all {len(rewards)} completions that end"
        return [CheckResult("missing EOS", f"{detail} (lowest {lowest:.3g})")]
    suggested = ceil(lowest - float(rewards.std(unbiased=False))) - 1  # below the lowest, whatever the spread
    detail = (
        f"{missing_eos_reward:g} is not below the rewards of {num_lower} of the {len(rewards)} completions "
        f"that end (lowest {lowest:.3g}, mean {float(rewards.mean()):.3g}): the policy may learn never to end"
    )
    return [CheckResult("missing EOS", f"{detail}; ppo.missing_eos_reward={suggested}", warned=True)]


def ends_with_stop_token(completions: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> list[bool]:
    """Return which completions end with one of the stop tokens."""
    return [bool(ids) and ids[-1] in stop_ids for ids in completions]
