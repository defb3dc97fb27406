"""KULLM's Korean prompt, a translation of Alpaca's, with and without an input; single-turn.

The reference is ``templates/kullm.json`` of nlpai-lab/KULLM (Korea University; polyglot-ko and LoRA).
"""

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

KULLM_PREAMBLE = "아래는 작업을 설명하는 명령어입니다. 요청을 적절히 완료하는 응답을 작성하세요."
KULLM_PREAMBLE_WITH_INPUT = (
    "아래는 작업을 설명하는 명령어와 추가 컨텍스트를 제공하는 입력이 짝을 이루는 예제입니다. "
    "요청을 적절히 완료하는 응답을 작성하세요."
)


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render one instruction and its answer; a system turn replaces the preamble."""
    system, turns = split_system(messages)
    check_single_turn("kullm", turns)
    request = turns[0]
    preamble = KULLM_PREAMBLE_WITH_INPUT if request.context else KULLM_PREAMBLE
    # A system text of the data is content, so that markers in it are escaped.
    head = Segment("content", system) if system else markup(preamble)
    segments = [BOS, head, markup("\n\n### 명령어:\n"), Segment("content", request.content)]
    if request.context:
        segments += [markup("\n\n### 입력:\n"), Segment("content", request.context)]
    segments.append(markup("\n\n### 응답:\n"))
    return segments + [piece for message in turns[1:] for piece in reply_segments(message)]


TEMPLATE = Template(render, markers=("### 명령어:", "### 입력:", "### 응답:"))
