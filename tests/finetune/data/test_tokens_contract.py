"""Every template with every kind of tokenizer: loss mask, EOS, BOS, prompts, injected markers."""

from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML, MAKERS, tokenizer
from transformers import AutoTokenizer

from data_templates.markers import Markers
from data_templates.segments import Message, TemplateError, with_context
from finetune.data.tokens import Encoded, Encoder
from finetune.recipe.discovery import plugin_names

STORIES = Path(__file__).parents[3] / "../shared/data/model/stories260K"
TOKENIZERS = [*MAKERS, *(["stories260K"] if STORIES.is_dir() else [])]
LOSSLESS = [name for name in TOKENIZERS if name != "unigram"]
ONE_EXCHANGE = [Message("user", "q one"), Message("assistant", "a one")]
TWO_EXCHANGES = [*ONE_EXCHANGE, Message("user", "q two"), Message("assistant", "a two")]
PAIRS = [(template, name) for template in plugin_names("data_templates") for name in TOKENIZERS]
BLANKS = dict.fromkeys(("cot", "hh", "koalpaca", "mistral", "mistral_v1", "vicuna"), " {}") | {
    "llama2": " {} "
}
"""Whitespace around a reply that the model generates."""
ENCODERS = {}


def encoder_of(template, name):
    """Return a cached encoder; `model` gets a ChatML template if the tokenizer has none."""
    if (template, name) not in ENCODERS:
        own = AutoTokenizer.from_pretrained(STORIES) if name == "stories260K" else tokenizer(name)
        if template == "tokenizer" and not own.chat_template:
            own = type(own).from_pretrained(STORIES) if name == "stories260K" else MAKERS[name]()
            own.chat_template = CHATML.replace("<|im_end|>", own.eos_token)
        ENCODERS[template, name] = Encoder(own, template)
    return ENCODERS[template, name]


def turns_for(encoder, messages):
    """Return the conversation, or its first exchange for single-turn templates."""
    try:
        encoder.encode(messages)
    except TemplateError:
        return list(messages[:2])
    return list(messages)


def trained_runs(encoded):
    """Return the token ids of each span that carries loss."""
    pairs = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    return [
        [token for token, _ in run] for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained
    ]


def decode_after_text(encoder, ids):
    """Decode ids as text after other text: some decoders drop a leading space."""
    [head] = encoder.tokenizer(["|"], add_special_tokens=False)["input_ids"]
    decode = encoder.tokenizer.decode
    return decode(head + list(ids), clean_up_tokenization_spaces=False).removeprefix(decode(head))


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_pain_02_loss_is_on_reply_and_end_token_of_each_turn_and_nothing_else(template, name):
    encoder = encoder_of(template, name)
    turns = turns_for(encoder, TWO_EXCHANGES)
    encoded = encoder.encode(turns)
    runs = trained_runs(encoded)
    assert len(encoded.input_ids) == len(encoded.loss_mask)
    replies = [turn.content for turn in turns if turn.role == "assistant"]
    assert len(runs) == len(replies)
    blanks = BLANKS.get(template, "{}")
    for run, reply in zip(runs, replies, strict=True):
        assert decode_after_text(encoder, run[:-1]) == blanks.format(reply)


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_pain_01_every_reply_ends_with_a_trained_stop_token(template, name):
    encoder = encoder_of(template, name)
    turns = turns_for(encoder, TWO_EXCHANGES)
    runs = trained_runs(encoder.encode(turns))
    assert [run for run in runs if run[-1] not in encoder.stop_ids] == []
    assert not any(token in encoder.stop_ids for run in runs for token in run[:-1])
    assert [encoder.decode_reply(run) for run in runs] == [m.content for m in turns if m.role == "assistant"]


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_pain_16_a_sequence_has_the_bos_that_its_tokenizer_adds_and_no_second_one(template, name):
    encoder = encoder_of(template, name)
    turns = turns_for(encoder, TWO_EXCHANGES)
    ids = encoder.encode(turns).input_ids
    bos = encoder.tokenizer.bos_token_id
    if template == "tokenizer":
        expected = 0  # the template decides, and this one has none
    elif encoder.tokenizer("a")["input_ids"][0] != bos:
        expected = 0
    else:
        expected = 2 if template == "llama2" else 1
    if bos != encoder.tokenizer.eos_token_id:
        assert ids.count(bos) == expected
    assert (ids[0] == bos and bos is not None) == (expected > 0)


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_pain_03_the_prompt_is_the_beginning_of_the_training_row(template, name):
    encoder = encoder_of(template, name)
    full = turns_for(encoder, [*TWO_EXCHANGES])
    for messages in (full, [Message("system", "Be brief."), *full], full[:2]):
        prompt = encoder.encode_prompt(messages[:-1])
        encoded = encoder.encode(messages)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.loss_mask[len(prompt)]


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_an_untrained_turn_has_the_same_tokens_and_no_loss(template, name):
    # Were it cut into tokens otherwise, history would differ between training and chat.
    encoder = encoder_of(template, name)
    turns = turns_for(encoder, [Message("user", "q"), Message("assistant", ":) a"), *TWO_EXCHANGES[:2]])
    silent = [turns[0], Message("assistant", turns[1].content, trained=False), *turns[2:]]
    trained, skipped = encoder.encode(turns), encoder.encode(silent)
    assert skipped.input_ids == trained.input_ids
    assert trained_runs(skipped) == trained_runs(trained)[1:]


def fragments(encoder):
    """Generate contents that are likely to form markers and special tokens."""
    full = [
        *encoder.template.markers,
        *encoder.special_tokens,
        "<|im_start|>",
        "<|im_end|>",
        "### Response:",
    ]
    halves = [half for text in full for half in (text[: len(text) // 2], text[len(text) // 2 :])]
    blanks = [" ", "\n", "\n\n", "", "▁", "assistant", "＜／s＞", "한글"]
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    return st.lists(st.sampled_from([*full, *halves, *blanks]) | anything, max_size=5).map("".join)


QUICK = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(("template", "name"), PAIRS)
@QUICK
@given(data=st.data())
def test_special_tokens_come_from_the_template_only(template, name, data):
    encoder = encoder_of(template, name)
    shape = turns_for(encoder, TWO_EXCHANGES)
    hostile = [Message(turn.role, data.draw(fragments(encoder))) for turn in shape]
    unknown = encoder.tokenizer.unk_token_id
    special = {encoder.tokenizer.convert_tokens_to_ids(token) for token in encoder.special_tokens} - {unknown}
    emitted = [token for token in encoder.encode(shape).input_ids if token in special]
    encoded = encoder.encode(hostile)
    assert [token for token in encoded.input_ids if token in special] == emitted
    prompt = encoder.encode_prompt(hostile[:-1])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert len(trained_runs(encoded)) == len(shape) // 2


@pytest.mark.parametrize("template", plugin_names("data_templates"))
@pytest.mark.parametrize("name", ["qwen", "llama2"])
@QUICK
@given(data=st.data())
def test_two_conversations_never_have_the_same_tokens(template, name, data):
    # The same pieces of text, distributed over the turns in two ways. Escaped content is excluded:
    # "</s>" becomes "< /s>", and may meet a text that was that already.
    encoder = encoder_of(template, name)
    shape = turns_for(encoder, TWO_EXCHANGES)
    pieces = data.draw(st.lists(fragments(encoder), min_size=2, max_size=6))
    one, other = (_distribute(data, pieces, shape) for _ in range(2))
    one, other = ([encoder._normalize(turn) for turn in turns] for turns in (one, other))
    first, second = encoder.encode(one), encoder.encode(other)
    if first.num_escaped or second.num_escaped:
        return
    same = [with_context(turn) for turn in one] == [with_context(turn) for turn in other]
    assert ((first.input_ids, first.loss_mask) == (second.input_ids, second.loss_mask)) == same


def _distribute(data, pieces, shape):
    between = len(shape) - 1
    cuts = data.draw(st.lists(st.integers(0, len(pieces)), min_size=between, max_size=between))
    bounds = [0, *sorted(cuts), len(pieces)]
    return [
        Message(turn.role, "".join(pieces[start:end]))
        for turn, start, end in zip(shape, bounds, bounds[1:], strict=False)
    ]


@pytest.mark.parametrize(("template", "name"), [pair for pair in PAIRS if pair[1] in LOSSLESS])
@QUICK
@given(data=st.data())
def test_replies_round_trip(template, name, data):
    encoder = encoder_of(template, name)
    # To SentencePiece ▁ is a space.
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12)
    # After an empty plain prompt the reply begins the sequence, and its first space is the tokenizer's own.
    requested, answered = "q" + data.draw(text), data.draw(text)
    encoded = encoder.encode([Message("user", requested), Message("assistant", answered)])
    markers = Markers.of([*encoder.template.markers, *encoder.special_tokens])
    [run] = trained_runs(encoded)
    expected = markers.escape_markers(answered)[0]
    assert encoder.decode_reply(run) == expected.strip()
    if not encoded.num_escaped:
        blanks = BLANKS.get(template, "{}")
        assert decode_after_text(encoder, run[:-1]) == blanks.format(answered)


@pytest.mark.parametrize(("template", "name"), PAIRS)
@QUICK
@given(data=st.data())
def test_encoding_many_is_encoding_each(template, name, data):
    encoder = encoder_of(template, name)
    turn = st.builds(
        Message,
        st.sampled_from(["user", "assistant", "system"]),
        st.sampled_from(["", "a", " b", "</s>", "\n"]) | st.text(max_size=4),
        st.sampled_from(["", "context"]),
        st.booleans(),
    )
    replies = data.draw(st.lists(fragments(encoder), max_size=3))
    good = [[Message("user", "a"), Message("assistant", text)] for text in replies]
    rows = data.draw(st.permutations([*data.draw(st.lists(st.lists(turn, max_size=4), max_size=4)), *good]))
    for row, encoded in zip(rows, encoder.encode_many(rows), strict=True):
        try:
            expected = encoder.encode(row)
        except TemplateError as error:
            assert isinstance(encoded, TemplateError)
            assert str(encoded) == str(error)
        else:
            assert isinstance(encoded, Encoded)
            assert encoded == expected
