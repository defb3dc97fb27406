r"""Chain of thought: question, then reasoning, then ``The answer is ...``; single-turn.

The wording is that of Wei et al. 2022 (arXiv 2201.11903, appendix G), trained and not given in the prompt, as
in Flan (Chung et al. 2022, arXiv 2210.11416); the answer is on its own line, as in some of Flan's phrasings,
because two of five solutions of GSM8K end without a full stop. In a reply that ends in GSM8K's mark
``\n#### 72`` (Cobbe et al. 2021, arXiv 2110.14168) the mark becomes that sentence, and the calculator
annotations (``<<48/2=24>>``) are removed. Any other reply is unchanged.
"""

import re
from collections.abc import Sequence

from data_templates.segments import (
    BOS,
    Message,
    Parsed,
    Segment,
    Template,
    check_single_turn,
    markup,
    reply_segments,
    split_system,
    user_segments,
)

ANSWER_MARK = "\n#### "
ANSWER = re.compile(r"(.*)\nThe answer is ([^\n]*\S[^\n]*)\.", re.DOTALL)
CALCULATOR_NOTE = re.compile(r"<<[^<>\n]*>>")


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render one question, its reasoning and answer; a system turn goes first."""
    system, turns = split_system(messages)
    check_single_turn("cot", turns)
    head = [BOS, Segment("content", system), markup("\n\n")] if system else [BOS]
    segments = [*head, markup("Q: "), *user_segments(turns[0]), markup("\nA:")]
    return segments + [piece for message in turns[1:] for piece in _reasoning_segments(message)]


def _reasoning_segments(message: Message) -> list[Segment]:
    # The last mark, should the reasoning contain another one.
    reasoning, mark, answer = message.content.rpartition(ANSWER_MARK)
    if not mark or not answer.strip():
        return reply_segments(message, before=" ")
    # One segment each, so that text around a removed annotation cannot form a marker unnoticed.
    reasoning_pieces = [Segment("content", piece) for piece in CALCULATOR_NOTE.split(reasoning)]
    segments = [Segment("markup", " "), *reasoning_pieces, Segment("markup", "\nThe answer is ")]
    segments += [Segment("content", answer), Segment("markup", "."), Segment("eos")]
    return [Segment(piece.kind, piece.text, message.trained, reply=True) for piece in segments]


def parse(text: str) -> Parsed:
    """Return a reply in GSM8K's notation (the calculator annotations are lost)."""
    text = text.removeprefix(" ")
    match = ANSWER.fullmatch(text)
    return Parsed(f"{match[1]}{ANSWER_MARK}{match[2]}" if match else text)


TEMPLATE = Template(render, markers=("\nQ:", "\nA:"), parse=parse)
