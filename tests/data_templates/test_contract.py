"""Contract of every template, new ones included (the folder is listed)."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_templates.markers import Markers
from data_templates.segments import Message, Template, TemplateError, render
from finetune.recipe.discovery import load_plugin, plugin_names

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
SPECIAL += [
    "<|start_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[|endofturn|]",
    "[INST]",
]
NAMES = plugin_names("data_templates")


def chat(messages, opened):
    """Render messages like a Jinja template with plain-text markers (that of many small models)."""
    names = {"system": "### System:\n", "user": "### Human:\n", "assistant": "### Assistant:\n"}
    text = "".join(
        f"{names[m['role']]}{m['content']}{'</s>' if m['role'] == 'assistant' else ''}\n" for m in messages
    )
    return text + (names["assistant"] if opened else "")


def template_of(name):
    """Return a template of the folder; `model` is bound to a chat template with plain-text markers."""
    module = load_plugin("data_templates", name, where="test")
    return module.bind_chat_template(chat, special_tokens=SPECIAL) if name == "tokenizer" else module.TEMPLATE


def several_turns(name):
    """Return True if a template is multi-turn."""
    try:
        template_of(name).render([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    except TemplateError:
        return False
    return True


MULTI = [name for name in NAMES if several_turns(name)]
ALL_MARKERS = sorted({marker for name in NAMES for marker in template_of(name).markers})


def conversation(texts, trained=()):
    """Make turns of texts: user, assistant, user, ..."""
    roles = ("user", "assistant")
    return [Message(roles[i % 2], text, trained=i not in trained) for i, text in enumerate(texts)]


def to_text(segments):
    """Return a rendering as text."""
    tokens = {"bos": "<s>", "eos": "</s>"}
    return "".join(segment.text or tokens.get(segment.kind, "") for segment in segments)


def fragments():
    """Generate text that is likely to form markers: complete ones, halves, special tokens, spaces."""
    full = [*ALL_MARKERS, *SPECIAL]
    halves = [half for text in full for half in (text[: len(text) // 2], text[len(text) // 2 :])]
    blanks = [" ", "\n", "\n\n", "\t", "", "\u200b", "ＵＳＥＲ：", "user", "assistant"]
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    return st.lists(st.sampled_from([*full, *halves, *blanks]) | anything, max_size=6).map("".join)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_on_replies_only_and_every_reply_ends(name):
    turns = ["q1", "a1", "q2", "a2"] if name in MULTI else ["q1", "a1"]
    segments, _ = render(template_of(name), conversation(turns), special_tokens=SPECIAL)
    assert all(segment.reply for segment in segments if segment.trained)
    trained = to_text([segment for segment in segments if segment.trained])
    end = next(segment for segment in reversed(segments) if segment.trained)
    ending = to_text([end])
    assert ending in SPECIAL
    assert [part.strip() for part in trained.split(ending)] == [*turns[1::2], ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_that_is_not_trained_carries_no_loss_and_reads_the_same(name):
    turns = ["q1", "a1", "q2", "a2"] if name in MULTI else ["q1", "a1"]
    template = template_of(name)
    trained, _ = render(template, conversation(turns), special_tokens=SPECIAL)
    skipped, _ = render(template, conversation(turns, trained={1}), special_tokens=SPECIAL)
    assert to_text(skipped) == to_text(trained)
    assert [s.reply for s in skipped] == [s.reply for s in trained]
    assert "a1" not in to_text([segment for segment in skipped if segment.trained])
    assert ("a2" in to_text([segment for segment in skipped if segment.trained])) == (name in MULTI)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_beginning_of_what_is_trained(name):
    template = template_of(name)
    turns = conversation(["q1", "a1", "q2", "a2"] if name in MULTI else ["q1", "a1"])
    for messages in (turns, [Message("system", "s"), *turns]):
        prompt, _ = render(template, messages[:-1], special_tokens=SPECIAL)
        full, _ = render(template, messages, special_tokens=SPECIAL)
        assert full[: len(prompt)] == prompt
        assert full[len(prompt)].reply
        assert not prompt[-1].reply


@pytest.mark.parametrize("name", NAMES)
def test_system_and_context_are_in_the_text(name):
    messages = [Message("system", "SYSTEMTEXT"), Message("user", "QUESTION", context="CONTEXT")]
    text = to_text(render(template_of(name), messages, special_tokens=SPECIAL)[0])
    assert text.index("SYSTEMTEXT") < text.index("QUESTION") < text.index("CONTEXT")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tokenizer"])
def test_every_sequence_begins_with_one_bos(name):
    segments, _ = render(template_of(name), conversation(["q1", "a1"]))
    assert [segment.kind for segment in segments].count("bos") == 1
    assert segments[0].kind == "bos"


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)  # other work on the machine is no failure of a template
@given(data=st.data())
def test_content_cannot_inject_a_turn(name, data):
    template = template_of(name)
    count = data.draw(st.integers(1, 4 if name in MULTI else 2))
    texts = [data.draw(fragments()) for _ in range(count)]
    system, context = data.draw(st.none() | fragments()), data.draw(fragments())
    hostile = _messages(texts, system, context)
    markers = Markers.of([*template.markers, *SPECIAL])
    harmless_context = markers.escape_markers(context)[0]
    neutral = _messages(
        ["x"] * count,
        None if system is None else "x" if system.strip() else "",
        "x" if harmless_context.strip() else "",
    )
    emitted = to_text(render(template, neutral, special_tokens=SPECIAL)[0])
    text = to_text(render(template, hostile, special_tokens=SPECIAL)[0])
    for marker in [*template.markers, *SPECIAL]:
        actual = len(re.findall(f"(?={re.escape(marker)})", text))
        assert actual == len(re.findall(f"(?={re.escape(marker)})", emitted)), (marker, text)


def _messages(texts, system, context):
    turns = conversation(texts)
    turns[0] = Message("user", texts[0], context=context)
    return turns if system is None else [Message("system", system), *turns]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", range(1, 4))
def test_a_special_token_in_two_halves_is_not_joined(name, cut):
    # `plain` puts question and answer side by side.
    halves = ["a" + "</s>"[:cut], "</s>"[cut:] + "b"]
    text = to_text(render(template_of(name), conversation(halves), special_tokens=SPECIAL)[0])
    neutral = to_text(render(template_of(name), conversation(["a", "b"]), special_tokens=SPECIAL)[0])
    assert text.count("</s>") == neutral.count("</s>")


@pytest.mark.parametrize("name", NAMES)
def test_escaped_markers_are_counted(name):
    template = template_of(name)
    forged = "".join(template.markers) + "</s>"
    _, count = render(template, conversation([forged]), special_tokens=SPECIAL)
    assert count == len(template.markers) + 1


def test_the_folder_is_listed_and_helpers_are_not():
    assert {"alpaca", "chatml", "koalpaca", "llama2", "tokenizer", "plain", "vicuna"} <= set(NAMES)
    assert {"llama3", "mistral", "gemma", "zephyr", "hh", "qwen", "cot", "flan", "toolcall"} <= set(NAMES)
    assert not any(name.startswith("_") for name in NAMES) and not {"markers", "segments"} & set(NAMES)
    assert isinstance(template_of("alpaca"), Template)
