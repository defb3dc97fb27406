"""Loss mask scope: loss on every assistant reply, on all tokens, or on the last reply only.

Loss on replies is the usual choice (Ouyang et al. 2022, arXiv 2203.02155); on all tokens it is instruction
modeling, which helps where replies are short and rows few (Shi et al. 2024, arXiv 2405.14394).
"""

from collections.abc import Sequence
from dataclasses import replace

from data_templates.segments import REPLY_ROLES, Message


def apply_loss_scope(messages: Sequence[Message], loss_on: str) -> list[Message]:
    """Return a conversation in which the replies' ``trained`` flags follow ``data.loss_on``.

    ``last_assistant`` removes the loss from every reply but the last; a last reply that the data itself marks
    as untrained stays untrained.
    """
    last = max((i for i, turn in enumerate(messages) if turn.role in REPLY_ROLES), default=-1)
    if loss_on != "last_assistant":
        return list(messages)
    return [turn if index == last else replace(turn, trained=False) for index, turn in enumerate(messages)]


def has_untrained_replies(messages: Sequence[Message]) -> bool:
    """Return True if the data itself marks a reply as untrained."""
    return any(turn.role in REPLY_ROLES and not turn.trained for turn in messages)


def build_loss_mask(reply_mask: Sequence[bool], loss_on: str) -> list[bool]:
    """Return a row's loss mask from the mask of its trained replies.

    ``all`` includes every token: prompts, markup and end tokens, and replies that are marked as untrained.
    """
    return [True] * len(reply_mask) if loss_on == "all" else list(reply_mask)
