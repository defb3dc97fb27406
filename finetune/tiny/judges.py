"""Judges of replies, for recipes: ``evaluate.judges: {happy_end: finetune/tiny/judges.py:happy_end}``."""

from finetune.tiny.stories import ends_happily, is_harsh, requested


def happy_end(prompt: str, reply: str) -> bool | None:
    """Tell whether a story that was asked for ends happily; nothing is said of other prompts."""
    return ends_happily(reply) if requested(prompt) else None


def peaceful(prompt: str, reply: str) -> bool | None:
    """Tell whether a story that was asked for has nobody taking the thing or quarrelling over it."""
    return not is_harsh(reply) if requested(prompt) else None
