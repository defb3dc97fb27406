"""Select training completions: best of n per prompt, or the top fraction of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sampled completion: prompt index, text, whether it ended with EOS, reward, rewards by source."""

    prompt_index: int
    text: str
    ended_with_eos: bool
    reward: float
    by_source: Mapping[str, float] = field(default_factory=dict)


def eligible(
    candidates: Sequence[Candidate], *, min_reward: float | None, keep_truncated: bool
) -> list[Candidate]:
    """Return the completions that may be selected.

    Args:
        candidates: all sampled completions.
        min_reward: the reward must be above this; None: no minimum.
        keep_truncated: whether completions without EOS may be selected.
    """
    return [
        candidate
        for candidate in candidates
        if (candidate.ended_with_eos or keep_truncated)
        and (min_reward is None or candidate.reward > min_reward)
    ]


def best_per_prompt(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the best completion of each prompt, in prompt order; ties go to the one sampled first.

    y* = argmax_k r(x, y_k): Touvron et al. 2023 (arXiv 2307.09288), section 3.2.3.
    """
    best: dict[int, Candidate] = {}
    for candidate in candidates:
        if candidate.prompt_index not in best or candidate.reward > best[candidate.prompt_index].reward:
            best[candidate.prompt_index] = candidate
    return list(best.values())


def top_candidates(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the ``count`` best completions of all prompts, without duplicates; ties go to the first.

    Dong et al. 2023 (arXiv 2304.06767), in its first version: the top 1/k of a batch.
    """
    first_seen: dict[tuple[int, str], Candidate] = {}
    for candidate in candidates:
        first_seen.setdefault((candidate.prompt_index, candidate.text), candidate)
    unique = list(first_seen.values())
    # sorted is stable: of equal rewards the completion sampled first wins.
    order = sorted(range(len(unique)), key=lambda index: -unique[index].reward)
    return [unique[index] for index in sorted(order[:count])]


def mean_best_of_n(rewards: np.ndarray) -> float:
    """Return the mean over prompts of the best of n rewards, given as (prompts, n)."""
    return float(rewards.max(axis=1).mean())
