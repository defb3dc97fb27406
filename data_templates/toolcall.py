"""Tool calls in ChatML, in the format of Hermes and Qwen: signatures, ``<tool_call>``, ``<tool_response>``.

Calls, thoughts (in ``<think>`` tags) and replies carry loss; signatures and tool responses do not.
The reference is the chat template of
Qwen/Qwen3-4B-Instruct-2507 (Qwen2.5's is the same after its system text); the data layout is LLaMA-Factory's
(``conversations`` with function_call and observation, and a column ``tools``).
"""

from collections.abc import Sequence
from itertools import groupby

from data_templates._chatml import CHATML_MARKERS, IM_END, assistant_header, assistant_reply, turn_segments
from data_templates._parsing import parse_hermes
from data_templates.segments import (
    BOS,
    Message,
    Segment,
    Template,
    markup,
    split_system,
    thought_segments,
    user_segments,
)

SIGNATURES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
CALL_INSTRUCTIONS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n</tool_call>"
)
TAGS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def render(messages: Sequence[Message]) -> list[Segment]:
    """Render system text and tools as one turn, then the other turns; an observation is a user turn."""
    system, turns = split_system(messages)
    head = [Segment("content", system)] if system else []
    if turns[0].role == "tools":
        # Qwen puts the signatures into the system turn, after its text.
        between = [markup("\n\n")] if system else []
        signatures = Segment("content", turns.pop(0).content)
        head += [*between, markup(SIGNATURES), signatures, markup(CALL_INSTRUCTIONS)]
    segments = [BOS, *(turn_segments("system", head) if head else [])]
    for role, group in groupby(turns, key=lambda message: message.role):
        same_role = list(group)
        if role == "assistant":
            segments += _call_turn(same_role[0]) if same_role[0].tool_calls else assistant_reply(same_role[0])
        else:
            content = _observations(same_role) if role == "observation" else user_segments(same_role[0])
            segments += [*turn_segments("user", content), assistant_header()]
    return segments


def _observations(messages: Sequence[Message]) -> list[Segment]:
    """Return the results of one turn's calls, which Qwen puts into one user turn."""
    segments: list[Segment] = []
    for message in messages:
        opening = markup("\n<tool_response>\n" if segments else "<tool_response>\n")
        segments += [opening, *user_segments(message), markup("\n</tool_response>")]
    return segments


def _call_turn(message: Message) -> list[Segment]:
    """Return an assistant turn with its text, if it has one, and one call per line."""
    text = Segment("content", message.content, message.trained, reply=True)
    segments = [*thought_segments(message), *([text] if message.content else [])]
    # Calls are one JSON object per line: calls_to_json_lines writes no line feed inside an object.
    for index, call in enumerate(message.tool_calls.split("\n")):
        segments += [
            _generated_markup("\n<tool_call>\n" if index or message.content else "<tool_call>\n", message),
            Segment("content", call, message.trained, reply=True),
            _generated_markup("\n</tool_call>", message),
        ]
    return [*segments, Segment("eos", IM_END, message.trained, reply=True), markup("\n")]


def _generated_markup(text: str, message: Message) -> Segment:
    """Return template text that the model has to generate."""
    return Segment("markup", text, message.trained, reply=True)


TEMPLATE = Template(
    render,
    markers=(*CHATML_MARKERS, *TAGS),
    stop=(IM_END,),
    tools=True,
    reasoning=True,
    parse=parse_hermes,
)
