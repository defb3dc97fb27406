"""Judges of replies, for recipes: ``evaluate.judges: {happy_end: finetune/tiny/judges.py:happy_end}``."""

from finetune.tiny.stories import ends_happily, requested


def happy_end(prompt: str, reply: str) -> bool | None:
    """Tell whether a story that was asked for ends happily; nothing is said of other prompts."""
    return ends_happily(reply) if requested(prompt) else None
