"""Flan's instruction phrasings: ten per task, selected by a hash of the row's text.

Ten phrasings per task are Flan's (Wei et al. 2021, arXiv 2109.01652); several make a model robust to wording
(T0: Sanh et al. 2021, arXiv 2110.08207). These are the Flan collection's (Longpre et al. 2023, arXiv
2301.13688; google-research/FLAN, flan/v2/templates.py): ``natinst_v2`` for rows with an input,
``t0_question_answer`` for the others, including T0's prompts. A hash of the task's text selects one, not a
seed: a row is rendered alike in every run, and in chat as in training. Flan's models take prompt and answer
as separate inputs and targets; here a line feed separates them. Single-turn.
"""

import hashlib
from collections.abc import Sequence

from data_templates.segments import (
    BOS,
    Message,
    Segment,
    Template,
    check_single_turn,
    markup,
    reply_segments,
    split_system,
)

WITH_INPUT = (
    ("", "\n\n", ""),
    (
        "You will be given a definition of a task first, then some input of the task.\n",
        "\n\n",
        "\nOutput:",
    ),
    ("Definition: ", "\nInput: ", "\nOutput:"),
    ("Instructions: ", "\nInput: ", "\nOutput:"),
    ("", "\nQ: ", "\nA: "),
    ("Given the task definition and input, reply with output. ", "\n\n", "\n"),
    ("Teacher:", "\nTeacher: Now, understand the problem? Solve this instance: ", "\nStudent:"),
    ("Q: ", "\n", "\nA:"),
    ("Detailed Instructions: ", "\nProblem:", "\nSolution:"),
    ("Detailed Instructions: ", "\nQ: ", "\nA:"),
)
"""Text before the task's definition, between it and the input, and after the input."""

WITHOUT_INPUT = (
    ("", "\n"),
    ("", "\nAnswer:"),
    ("", "\nA:"),
    ("Q:", "\nA:"),
    ("Question: ", "\nAnswer:"),
    ("Answer the following question: ", "\nAnswer:"),
    ("Given the question: ", "\nThe answer is:"),
    ("", "\nThe answer to this question is:"),
    ("Please answer the following question: ", "\nA:"),
    ("Please answer the following question: ", "\nAnswer:"),
)
"""Text before the question, and after it."""


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render one task and its answer, in the phrasing selected by its text; a system turn goes first."""
    system, turns = split_system(messages)
    check_single_turn("flan", turns)
    head = [BOS, Segment("content", system), markup("\n\n")] if system else [BOS]
    segments = [*head, *_prompt_segments(turns[0])]
    return segments + [piece for message in turns[1:] for piece in reply_segments(message)]


def _prompt_segments(request: Message) -> list[Segment]:
    task = Segment("content", request.content)
    if not request.context:
        prefix, suffix = WITHOUT_INPUT[hash_index(request.content, len(WITHOUT_INPUT))]
        return [markup(prefix), task, markup(_answer_prefix(suffix, request.content))]
    # The separator makes ("ab", "c") and ("a", "bc") two texts.
    prefix, between, suffix = WITH_INPUT[hash_index(f"{request.content}\0{request.context}", len(WITH_INPUT))]
    context = Segment("content", request.context)
    return [markup(prefix), task, markup(between), context, markup(_answer_prefix(suffix, request.context))]


def hash_index(text: str, count: int) -> int:
    """Return an index below ``count``, a hash of the text.

    >>> [hash_index(text, 10) for text in ("Add 2 and 3.", "Add 2 and 4.")]
    [4, 6]
    """
    # sha256 and not hash(), which is salted per process for strings.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % count


def _answer_prefix(suffix: str, text: str) -> str:
    """Return the end of a phrasing, with a line feed before the answer; T0's prompts already have one."""
    prefix = suffix if suffix.endswith("\n") else f"{suffix}\n"
    return prefix.removeprefix("\n") if text.endswith("\n") else prefix


TEMPLATE = Template(render)
