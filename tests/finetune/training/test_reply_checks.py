"""The check of replies: prompt as at inference, trained text and stop token are the whole rendering."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from data_templates import chatml
from data_templates.segments import Message, Segment, Template, markup
from finetune.data.conversation import Conversation
from finetune.data.tokens import Encoder
from finetune.training.preflight.reply_checks import check_replies

TURNS = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate("abcd")]
ROWS = [Conversation(TURNS[:2], "a:1"), Conversation(TURNS, "a:2")]
OPENS_THOUGHT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: <think>\n{% endif %}"
)
COUNTS = (
    "{{ messages | length }}{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

Change = Callable[[list[Segment], bool], list[Segment]]


@pytest.fixture
def encoder_of(base_folder):
    def build(template: str | None = None, change: Change | None = None, **options: str) -> Encoder:
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        tokenizer.chat_template = template
        encoder = Encoder(tokenizer, "tokenizer" if template else "chatml", **options)
        if change is not None:

            def render(messages: Sequence[Message]) -> list[Segment]:
                return change(chatml.render(messages), messages[-1].role == "assistant")

            encoder.template = Template(render, stop=("<|im_end|>",), reasoning=True)
        return encoder

    return build


@pytest.mark.parametrize("reasoning", ["keep", "strip", "mask"])
def test_own_templates_pass(encoder_of, reasoning: str) -> None:
    thinking = [TURNS[0], replace(TURNS[1], reasoning="one")]
    result = check_replies([*ROWS, Conversation(thinking, "a:3")], encoder_of(reasoning=reasoning))
    assert result.problem is None
    assert result.detail == "3 decoded: prompt as at inference, reply, stop token; the first: 'b</s>'"


def test_one_reply_per_row_and_a_thought_that_the_template_leaves_out(encoder_of) -> None:
    result = check_replies(ROWS, encoder_of(OPENS_THOUGHT))
    assert result.detail.startswith("3 decoded") and result.detail.endswith(r"'\n</think>\n\nb</s>'")


def test_a_prompt_that_changes_once_the_reply_is_there_is_reported(encoder_of) -> None:
    result = check_replies(ROWS, encoder_of(COUNTS))
    assert result.problem is None and "3 have a prompt that the template renders differently" in result.detail


def untrained_start(segments: list[Segment], has_reply: bool) -> list[Segment]:
    first = next((i for i, segment in enumerate(segments) if segment.reply), None)
    if first is None:
        return segments
    return [*segments[:first], Segment("markup", "So: ", reply=True), *segments[first:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pieces, has_reply: [markup("Then. " if has_reply else ""), *pieces], "another prompt"),
        (untrained_start, "'So: ' precedes the trained text of turn 2"),
        (lambda pieces, _: [p for p in pieces if p.kind != "eos"], "does not end with a stop token"),
        (lambda pieces, _: [replace(p, trained=False) for p in pieces], "turn 2 has no trained token"),
    ],
)
def test_a_template_that_trains_something_else_stops_the_run(
    encoder_of, change: Change, message: str
) -> None:
    result = check_replies(ROWS, encoder_of(change=change))
    assert result.problem is not None and message in result.problem.actual
    assert result.problem.actual.startswith("a:1: ") and result.problem.repair


def test_rows_that_cannot_be_rendered_are_left_to_the_data_report(encoder_of) -> None:
    unfit = [Message("user", "a"), Message("assistant", "", tool_calls='{"name": "a", "arguments": {}}')]
    assert check_replies([Conversation(unfit, "a:1")], encoder_of()).detail == "no conversation to check"
