"""Markers that are special tokens: written by the template, never by the data, for each tokenizer."""

import pytest
from small_tokenizers import MAKERS
from tokenizers import AddedToken

from data_templates.segments import Message, render
from finetune.data.conversation import render_reply
from finetune.data.tokens import Encoder

ASK, ANSWER = Message("user", "hello"), Message("assistant", "Hello!")
SYSTEM = Message("system", "Be brief.")
TURNS = [SYSTEM, ASK, ANSWER, Message("user", "more"), Message("assistant", "yes")]

TOKENS = {
    "llama3": ("llama3", []),
    "gemma": ("llama3", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": ("llama2", ["[INST]", "[/INST]"]),
    "exaone": ("gpt2", ["[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"]),
    "qwen": ("qwen", []),
    "toolcall": ("qwen", []),
    "zephyr": ("llama2", []),
}
"""A template, the kind of tokenizer it was published with, and that tokenizer's additional tokens."""


def encoder_of(name):
    """Return an encoder whose tokenizer has the template's markers as special tokens."""
    kind, special = TOKENS[name]
    own = MAKERS[kind]()
    own.add_special_tokens({"additional_special_tokens": special})
    if name in ("qwen", "toolcall"):  # Qwen's are added, and not marked as special
        own.add_tokens([AddedToken(token, special=False) for token in ("<tool_call>", "</tool_call>")])
    return Encoder(own, name)


@pytest.mark.parametrize("name", TOKENS)
def test_each_marker_is_one_token(name):
    encoder = encoder_of(name)
    ids = encoder.encode(TURNS).input_ids
    full = {**encoder.tokenizer.get_added_vocab()}
    used = [marker for marker in encoder.template.markers if marker in full]
    text = encoder.tokenizer.decode(ids)
    for marker in used:
        assert ids.count(full[marker]) == text.count(marker), marker
    written = [marker for marker in used if text.count(marker)]
    assert len(written) >= {"mistral": 2, "toolcall": 2, "zephyr": 0}.get(name, 2)


@pytest.mark.parametrize("name", TOKENS)
def test_the_tokens_are_those_of_the_complete_text(name):
    """A server renders a prompt as text and encodes it in one piece."""
    encoder = encoder_of(name)
    segments, _ = render(encoder.template, TURNS[:2])
    ends = {"eos": encoder.tokenizer.eos_token}
    text = "".join(segment.text or ends.get(segment.kind, "") for segment in segments)
    assert encoder.encode_prompt(TURNS[:2]) == encoder.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", TOKENS)
def test_the_data_cannot_inject_a_marker(name):
    encoder = encoder_of(name)
    markers = [*encoder.template.markers, *encoder.special_tokens]
    forged = Message("user", "x ".join(markers), context=" ".join(markers))
    full = set(encoder.tokenizer.get_added_vocab().values())
    neutral = Message("user", "x", context="x")
    ids = encoder.encode([SYSTEM, forged, ANSWER]).input_ids
    expected = encoder.encode([SYSTEM, neutral, ANSWER]).input_ids
    assert [token for token in ids if token in full] == [token for token in expected if token in full]


@pytest.mark.parametrize("name", TOKENS)
def test_the_end_of_turn_token_is_trained_and_stops_generation(name):
    encoder = encoder_of(name)
    encoded = encoder.encode([ASK, ANSWER])
    last = [token for token, trained in zip(encoded.input_ids, encoded.loss_mask, strict=True) if trained][-1]
    end = encoder.template.stop[0] if encoder.template.stop else encoder.tokenizer.eos_token
    assert encoder.tokenizer.convert_ids_to_tokens(last) == end
    assert last in encoder.stop_ids


def test_a_call_is_trained_with_its_tags_and_an_observation_is_not():
    encoder = encoder_of("toolcall")
    call = '{"name": "add", "arguments": {"a": 1}}'
    turns = [Message("tools", '{"type": "function", "function": {"name": "add"}}'), ASK]
    turns += [Message("assistant", "", tool_calls=call), Message("observation", "3"), ANSWER]
    encoded = encoder.encode(turns)
    trained_text = [
        token for token, trained in zip(encoded.input_ids, encoded.loss_mask, strict=True) if trained
    ]
    text = f"<tool_call>\n{call}\n</tool_call><|im_end|>Hello!<|im_end|>"
    assert encoder.tokenizer.decode(trained_text) == text
    assert encoder.encode_prompt(turns[:4]) == encoded.input_ids[: len(encoder.encode_prompt(turns[:4]))]
    assert render_reply(turns[:3], encoder)[-1].content == f"<tool_call>\n{call}\n</tool_call>"


def test_mistral_trains_only_on_the_reply_after_the_system_text():
    encoder = encoder_of("mistral")
    with_system, without = encoder.encode(TURNS), encoder.encode(TURNS[1:])
    trained_text = [
        encoder.decode_reply([t for t, trained in zip(e.input_ids, e.loss_mask, strict=True) if trained])
        for e in (with_system, without)
    ]
    assert trained_text == ["yes", "Hello!"]
    assert sum(without.loss_mask) > sum(with_system.loss_mask) > 0


@pytest.mark.parametrize(
    ("template", "reply", "words"),
    [
        ("alpaca", " 5 ", "5"),
        ("llama2", "5", "5"),
        ("cot", "1+1 = <<1+1=2>>2\n#### 2", "1+1 = 2\nThe answer is 2."),
        ("chatml", "a<|im_end|>b", "a< |im_end|>b"),
        ("tokenizer", "5", "5"),
    ],
)
def test_the_reference_reply_is_the_trained_text(template, reply, words):
    encoder = Encoder(MAKERS["qwen"](), template, system="Be brief." if template == "alpaca" else None)
    turns = [ASK, Message("assistant", reply), Message("user", "and?")]
    assert render_reply(turns, encoder) == [ASK, Message("assistant", words)]
    trained_text = encoder.encode(turns[:2])
    ids = [
        token
        for token, trained in zip(trained_text.input_ids, trained_text.loss_mask, strict=True)
        if trained
    ]
    assert encoder.decode_reply(ids) == words
