"""Graders of completions: ``evaluate.graders: {happy_end: finetune/tiny/graders.py:happy_end}``."""

from finetune.tiny.stories import ends_happily, is_harsh, requested


def happy_end(prompt: str, reply: str) -> bool | None:
    """Return whether a requested story ends happily; None for other prompts."""
    return ends_happily(reply) if requested(prompt) else None


def peaceful(prompt: str, reply: str) -> bool | None:
    """Return whether nobody in a requested story takes or fights over the thing; None for other prompts."""
    return not is_harsh(reply) if requested(prompt) else None
