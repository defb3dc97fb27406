"""Which of many judged replies are learnt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Reply:
    """A drawn reply: the number of its prompt, its text, whether it ended by itself, what it is worth."""

    prompt: int
    text: str
    ended: bool
    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)


def eligible(replies: Sequence[Reply], *, above: float | None, unfinished: bool) -> list[Reply]:
    """Return the replies that may be learnt at all.

    Args:
        replies: what was drawn.
        above: their reward must be more than this; None: any.
        unfinished: whether those may be learnt that did not end by themselves.
    """
    return [
        reply for reply in replies if (reply.ended or unfinished) and (above is None or reply.reward > above)
    ]


def best_of_each(replies: Sequence[Reply]) -> list[Reply]:
    """Return each prompt's best reply, the first drawn of equals, in the order of the prompts.

    y* = argmax_k r(x, y_k): Touvron et al. 2023 (arXiv 2307.09288), section 3.2.3.
    """
    best: dict[int, Reply] = {}
    for reply in replies:
        if reply.prompt not in best or reply.reward > best[reply.prompt].reward:
            best[reply.prompt] = reply
    return list(best.values())


def top_share(replies: Sequence[Reply], count: int) -> list[Reply]:
    """Return the ``count`` best replies of all, the first drawn of equals; a reply is taken once a prompt.

    Dong et al. 2023 (arXiv 2304.06767), in its first version: the top 1/k of a batch.
    """
    first: dict[tuple[int, str], Reply] = {}
    for reply in replies:
        first.setdefault((reply.prompt, reply.text), reply)
    once = list(first.values())
    order = sorted(range(len(once)), key=lambda index: -once[index].reward)
    return [once[index] for index in sorted(order[:count])]


def best_of_n(rewards: np.ndarray) -> float:
    """Return the mean over prompts of the best of n rewards: (prompts, n)."""
    return float(rewards.max(axis=1).mean())
