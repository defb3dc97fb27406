"""``parse`` is the inverse of rendering a reply, for every template; what it cannot parse is content."""

import pytest
from chat_kinds import KINDS, bound, call, reply, user
from hypothesis import given, settings
from hypothesis import strategies as st

from data_templates.segments import TemplateError
from finetune.recipe.discovery import load_plugin, plugin_names

ASK = user("hello")
NAMES = [name for name in plugin_names("data_templates") if name != "tokenizer"]
TEMPLATES = {name: load_plugin("data_templates", name, where="test").TEMPLATE for name in NAMES}
TWO_CALLS = f"{call(w=5)}\n{call(w=6, unit='제곱')}"
REPLIES = {
    "text": reply("Hi. 2 < 3\n\n{a}"),
    "thought": reply("Hi.", reasoning="One.\n\nTwo."),
    "call": reply("", tool_calls=call(w=5)),
    "text and calls": reply("I look.", tool_calls=TWO_CALLS),
    "all": reply("I look.", reasoning="Measure.", tool_calls=call(w=5)),
}


def written(template, message):
    """Return a reply's text without its end."""
    pieces = [segment for segment in template.render([ASK, message]) if segment.reply]
    return "".join(segment.text for segment in pieces[:-1])


def parts(parsed):
    return parsed.content, parsed.reasoning, parsed.tool_calls


@pytest.mark.parametrize("name", NAMES)
def test_the_text_of_a_reply_comes_back(name):
    template = TEMPLATES[name]
    for content in ("Hi.", " Hi. ", "a\n\nb\n", "It is 5 > 3 }", "Human: no", '{"name": "area"}'):
        assert parts(template.parse(written(template, reply(content)))) == (content, "", "")


@pytest.mark.parametrize("name", [name for name in NAMES if TEMPLATES[name].reasoning])
@pytest.mark.parametrize("kind", [kind for kind in REPLIES if "call" not in kind and kind != "all"])
def test_thoughts_come_back(name, kind):
    message = REPLIES[kind]
    assert parts(TEMPLATES[name].parse(written(TEMPLATES[name], message))) == parts(message)


@pytest.mark.parametrize("kind", REPLIES)
def test_calls_come_back(kind):
    template, message = TEMPLATES["toolcall"], REPLIES[kind]
    assert parts(template.parse(written(template, message))) == parts(message)


def test_gsm8ks_notation_comes_back():
    template = TEMPLATES["cot"]
    assert template.parse(written(template, reply("1+1 = <<1+1=2>>2\n#### 2"))).content == "1+1 = 2\n#### 2"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nno json\n</tool_call>",
        '<tool_call>\n{"name": "area"}\n</tool_call>',
        '<tool_call>\n{"name": "area", "arguments": {}}',
        '<tool_call>\n{"name": "area", "arguments": {}}\n</tool_call> and more',
        "<think>\nwithout an end",
        "a thought</think>b",
    ],
)
def test_what_cannot_be_parsed_is_content(text):
    assert parts(TEMPLATES["toolcall"].parse(text)) == (text, "", "")
    assert parts(bound("tools").parse(text)) == (text, "", "")


def test_a_thought_is_parsed_with_other_line_feeds():
    for text in ("<think>One.</think>Hi.", "\n<think>\nOne.\n</think>\nHi."):
        assert parts(TEMPLATES["chatml"].parse(text)) == ("Hi.", "One.", "")


@pytest.mark.parametrize("name", KINDS)
def test_replies_of_the_chat_templates_of_tokenizers_come_back(name):
    template, kind = bound(name), KINDS[name]
    for label, message in REPLIES.items():
        try:
            text = written(template, message)
        except TemplateError:
            assert label != "text" and not (label == "thought" and kind.thoughts)
            continue
        if name == "recipients" and message.content and message.tool_calls:
            continue  # it writes the text after the calls
        assert parts(template.parse(text)) == parts(message), label


@settings(deadline=None, max_examples=100)
@given(text=st.text("<>/think \n{}\"':,name[]tool_calarguments", max_size=60))
def test_any_text_is_parsed_to_parts_that_render_as_this_text(text):
    for template in (TEMPLATES["toolcall"], bound("thinks last")):
        parsed = template.parse(text)
        rendered = parsed.reasoning + parsed.content + parsed.tool_calls
        assert len("".join(rendered.split())) <= len("".join(text.split())) + 40
        if not parsed.reasoning and not parsed.tool_calls:
            assert parsed.content.strip() in text
