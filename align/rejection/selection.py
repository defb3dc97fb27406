"""Select training completions: best of n per prompt, or the top fraction of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from align.rejection.settings import RejectionSettings
from finetune.recipe.errors import Problem, UserError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sampled completion: prompt index, text, whether it ended with EOS, reward, rewards by source."""

    prompt_index: int
    text: str
    ended_with_eos: bool
    reward: float
    by_source: Mapping[str, float] = field(default_factory=dict)


def select_candidates(
    candidates: Sequence[Candidate], settings: RejectionSettings, *, round_index: int
) -> list[Candidate]:
    """Return the completions of a round that are trained on.

    Args:
        candidates: all completions of the round.
        settings: the recipe's rejection section.
        round_index: index of the round, for the error message.

    Raises:
        UserError: no completion may be selected.
    """
    keep_truncated = settings.truncated == "train"
    selectable = eligible(candidates, min_reward=settings.min_reward, keep_truncated=keep_truncated)
    if not selectable:
        num_ended = sum(candidate.ended_with_eos for candidate in candidates)
        # Both numbers tell which of the two conditions is too strict.
        best = max(candidate.reward for candidate in candidates)
        outcome = f"{num_ended} ended, best reward {best:.3g}"
        actual = f"round {round_index}: none of {len(candidates)} completions; {outcome}"
        repair = "raise sampling.max_new_tokens, or lower rejection.min_reward"
        raise UserError(Problem("rejection", actual, "completions to train on", repair))
    if settings.keep == "best_of_n":
        return best_per_prompt(selectable)
    # A fraction of all completions of the round, not of the eligible ones.
    fraction = settings.top_fraction or 1 / settings.num_generations
    return top_candidates(selectable, max(1, round(fraction * len(candidates))))


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
