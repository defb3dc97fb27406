"""Findings of a finished run: a diagnosis with its numbers, their meaning and a suggested action."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from finetune.evaluation.small_samples import is_conclusive

PHRASE_WORDS, MIN_REPEATS = 4, 3
"""A completion repeats itself if a phrase of 4 words occurs 3 times."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One diagnosis: the numbers, their meaning, and an action if one is needed."""

    name: str
    evidence: str
    meaning: str
    action: str = ""

    def format_line(self) -> str:
        """Return the finding as one line for the terminal; ``!!`` marks one that needs action."""
        mark, action = ("!!", f" -> {self.action}") if self.action else ("--", "")
        return f"{mark}  {self.name:<13} {self.evidence}: {self.meaning}{action}"

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "warned": bool(self.action)}


def repetition_finding(completions: Sequence[tuple[str, str]], action: str) -> Finding | None:
    """Return a finding if more completions repeat themselves or each other after training than before.

    Args:
        completions: completions of some prompts, before and after training.
        action: the suggested action.
    """
    num_repeating = [sum(_repeats_itself(pair[when]) for pair in completions) for when in (0, 1)]
    num_duplicates = [_count_duplicates([pair[when] for pair in completions]) for when in (0, 1)]
    if num_repeating[1] <= num_repeating[0] and num_duplicates[1] <= num_duplicates[0]:
        return None
    evidence = (
        f"of {len(completions)} completions, self-repeating: {num_repeating[0]} → {num_repeating[1]}, "
        f"duplicates of another one: {num_duplicates[0]} → {num_duplicates[1]}"
    )
    counts = [max(pair) / len(completions) for pair in zip(num_repeating, num_duplicates, strict=True)]
    if not is_conclusive(counts[0], counts[1], len(completions)):
        return Finding("repetition", evidence, "too few completions to tell (evaluate.samples=40)")
    meaning = "repetition loops, typical of a policy that drifted too far from its reference"
    return Finding("repetition", evidence, meaning, action)


def count_repeating(completions: Sequence[str]) -> int:
    """Return how many completions repeat themselves, plus how many are duplicates of an earlier one."""
    return sum(map(_repeats_itself, completions)) + _count_duplicates(completions)


def _repeats_itself(completion: str) -> bool:
    words = completion.split()
    # The shifted word lists differ in length: zip stops at the last complete phrase.
    phrases = Counter(zip(*(islice(words, start, None) for start in range(PHRASE_WORDS)), strict=False))
    return max(phrases.values(), default=0) >= MIN_REPEATS


def _count_duplicates(completions: Sequence[str]) -> int:
    """Return how many completions are exact duplicates of an earlier one."""
    return len(completions) - len(set(completions))
