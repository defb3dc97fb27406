"""Chain of thought: GSM8K's answers become reasoning and the sentence with the answer."""

import pytest

from data_templates import cot
from data_templates.segments import Message, render

ASK = Message("user", "How many?")


def answer(text, **more):
    """Return the rendered text of a reply."""
    segments, _ = render(cot.TEMPLATE, [ASK, Message("assistant", text)], **more)
    assert all(segment.trained for segment in segments if segment.reply)
    return "".join(segment.text for segment in segments if segment.reply)


@pytest.mark.parametrize(
    ("reply", "written"),
    [
        ("1+1 = <<1+1=2>>2\n#### 2", " 1+1 = 2\nThe answer is 2."),
        ("It is $<<50*2=100>>100.\n#### 1,000", " It is $100.\nThe answer is 1,000."),
        ("First\n#### 1\nthen\n#### 2", " First\n#### 1\nthen\nThe answer is 2."),
        ("plain answer", " plain answer"),
        ("#### 2", " #### 2"),
        ("reasons\n#### ", " reasons\n#### "),
        ("a << b >> c", " a << b >> c"),
        ("no mark <<1=1>>", " no mark <<1=1>>"),
    ],
)
def test_reasoning_then_the_answer(reply, written):
    assert answer(reply) == written


def test_a_removed_annotation_joins_no_marker():
    assert answer("x <<<1=1>>/s>\n#### 2", special_tokens=["</s>"]) == " x < /s>\nThe answer is 2."
    assert answer("x\n<<1=1>>Q: y\n#### 2") == " x\n Q: y\nThe answer is 2."
