"""Chain of hindsight: completions behind one another, each announced by what was thought of it.

Liu et al. 2023 (arXiv 2302.02676), section 3: "PROMPT Bad: WORSE Good: BETTER", and the other way round; the
completions carry loss, the feedback does not. Asked for a good answer, the tuned model knows what that means.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from align.preference.judged import Comparison
from data_templates._segments import Message
from finetune.data.conversation import Conversation, wishing

ORDER = 5
"""What this random stream is for, beside those of reading and mixing."""


def chains(rows: Iterable[Comparison], *, good: str, bad: str, seed: int) -> list[Conversation]:
    """Return each prompt with its best and its worst completion, one behind the other in a drawn order.

    Args:
        rows: prompts with two completions or more.
        good: the words that ask for the best one.
        bad: those that ask for the worst one.
        seed: draws the order.
    """
    random = np.random.default_rng([seed, ORDER])
    return [_chain(row, good=good, bad=bad, good_first=bool(random.integers(2))) for row in rows]


def _chain(row: Comparison, *, good: str, bad: str, good_first: bool) -> Conversation:
    answers = [(good, row.replies[0]), (bad, row.replies[-1])]
    (first_wish, first), (second_wish, second) = answers if good_first else answers[::-1]
    asked = [replace(turn, trained=False) for turn in wishing(row.prompt, first_wish)]
    turns = [*asked, first, Message("user", second_wish), second]
    return Conversation(turns, row.where, row.source)


def questions(rows: Iterable[Comparison]) -> list[Conversation]:
    """Return each prompt with its best completion, once: what samples ask for and expect."""
    first = {row.prompt: row for row in reversed(list(rows))}
    return [Conversation([*row.prompt, row.replies[0]], row.where, row.source) for row in first.values()]
