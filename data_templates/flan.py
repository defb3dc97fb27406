"""Several phrasings of one task, as Flan has them: which one a row gets depends on the row's own text alone.

Ten phrasings a task are Flan's (Wei et al. 2021, arXiv 2109.01652); several make a model robust to wording
(T0: Sanh et al. 2021, arXiv 2110.08207). These are the Flan collection's (Longpre et al. 2023, arXiv
2301.13688; google-research/FLAN, flan/v2/templates.py): ``natinst_v2`` for rows with an input,
``t0_question_answer`` for the others, T0's prompts among them. A digest of the task's text draws one, and no
seed: a row reads the same in every run, and chat asks as training did. Flan's models read the prompt apart
from the answer; in one stream of text a line feed stands between the two. One exchange.
"""

import hashlib
from collections.abc import Sequence

from data_templates._segments import (
    BOS,
    Message,
    Segment,
    Template,
    markup,
    only_one_exchange,
    reply,
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
"""What stands before the task's definition, between it and the input, and behind."""

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
"""What stands before the question, and behind."""


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render one task and its answer in the words that the task's text draws; a system turn stands above."""
    system, turns = split_system(messages)
    only_one_exchange("flan", turns)
    head = [BOS, Segment("content", system), markup("\n\n")] if system else [BOS]
    segments = [*head, *_phrased(turns[0])]
    return segments + [piece for message in turns[1:] for piece in reply(message)]


def _phrased(request: Message) -> list[Segment]:
    task = Segment("content", request.content)
    if not request.context:
        before, behind = WITHOUT_INPUT[drawn(request.content, len(WITHOUT_INPUT))]
        return [markup(before), task, markup(_end(behind, request.content))]
    before, between, behind = WITH_INPUT[drawn(f"{request.content}\0{request.context}", len(WITH_INPUT))]
    given = Segment("content", request.context)
    return [markup(before), task, markup(between), given, markup(_end(behind, request.context))]


def drawn(text: str, count: int) -> int:
    """Return a number below ``count`` that depends on the text alone.

    >>> [drawn(text, 10) for text in ("Add 2 and 3.", "Add 2 and 4.")]
    [4, 6]
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % count


def _end(behind: str, text: str) -> str:
    """Return the end of a phrasing, with a line feed before the answer; T0's prompts bring one along."""
    end = behind if behind.endswith("\n") else f"{behind}\n"
    return end.removeprefix("\n") if text.endswith("\n") else end


TEMPLATE = Template(render)
