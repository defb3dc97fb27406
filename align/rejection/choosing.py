"""Select training completions: best of n per prompt, or the top fraction of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Reply:
    """A sampled completion: prompt index, text, whether it ended with EOS, reward, rewards by source."""

    prompt: int
    text: str
    ended: bool
    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)


def eligible(replies: Sequence[Reply], *, above: float | None, unfinished: bool) -> list[Reply]:
    """Return the completions that may be selected.

    Args:
        candidates: all sampled completions.
        min_reward: the reward must be above this; None: no minimum.
        keep_truncated: whether completions without EOS may be selected.
    """
    return [
        reply for reply in replies if (reply.ended or unfinished) and (above is None or reply.reward > above)
    ]


def best_of_each(replies: Sequence[Reply]) -> list[Reply]:
    """Return the best completion of each prompt, in prompt order; ties go to the one sampled first.

    y* = argmax_k r(x, y_k): Touvron et al. 2023 (arXiv 2307.09288), section 3.2.3.
    """
    best: dict[int, Reply] = {}
    for reply in replies:
        if reply.prompt not in best or reply.reward > best[reply.prompt].reward:
            best[reply.prompt] = reply
    return list(best.values())


def top_share(replies: Sequence[Reply], count: int) -> list[Reply]:
    """Return the ``count`` best completions of all prompts, without duplicates; ties go to the first.

    Dong et al. 2023 (arXiv 2304.06767), in its first version: the top 1/k of a batch.
    """
    first: dict[tuple[int, str], Reply] = {}
    for reply in replies:
        first.setdefault((reply.prompt, reply.text), reply)
    once = list(first.values())
    order = sorted(range(len(once)), key=lambda index: -once[index].reward)
    return [once[index] for index in sorted(order[:count])]


def best_of_n(rewards: np.ndarray) -> float:
    """Return the mean over prompts of the best of n rewards, given as (prompts, n)."""
    return float(rewards.max(axis=1).mean())
