"""``data.reasoning``: thoughts are trained, removed, or kept without loss; variables of a template."""

import pytest
from small_tokenizers import MAKERS

from data_templates.segments import Message, TemplateError
from finetune.data.conversation import Conversation, render_reply
from finetune.data.dataset import Conversations, tokenize_conversations
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder

THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not (thinking | default(true)) %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
ASK = Message("user", "hello")
FIELD = [ASK, Message("assistant", "Hi.", reasoning="A greeting.")]
INLINE = [ASK, Message("assistant", "<think>\nA greeting.\n</think>\n\nHi.")]
THOUGHT = "<think>\nA greeting.\n</think>\n\n"


def encoder_of(template: str, **options: object) -> Encoder:
    tokenizer = MAKERS["qwen"]()
    tokenizer.chat_template = THINKS
    return Encoder(tokenizer, template, **options)  # type: ignore[arg-type]


def texts(encoder: Encoder, messages: list[Message]) -> tuple[str, str]:
    """Return a row's text, and its trained text."""
    encoded = encoder.encode(messages)
    trained = [i for i, kept in zip(encoded.input_ids, encoded.loss_mask, strict=True) if kept]
    return encoder.tokenizer.decode(encoded.input_ids), encoder.tokenizer.decode(trained)


@pytest.mark.parametrize("template", ["tokenizer", "chatml", "toolcall"])
@pytest.mark.parametrize("messages", [FIELD, INLINE])
def test_thoughts_are_kept_removed_or_masked(template: str, messages: list[Message]) -> None:
    kept, trained = texts(encoder_of(template), messages)
    assert trained == f"{THOUGHT}Hi.<|im_end|>"
    masked, trained = texts(encoder_of(template, reasoning="mask"), messages)
    assert masked == kept and trained == "Hi.<|im_end|>"
    stripped, trained = texts(encoder_of(template, reasoning="strip"), messages)
    assert stripped == kept.replace(THOUGHT, "") and trained == "Hi.<|im_end|>"


def test_a_template_without_reasoning_trains_rows_whose_thoughts_are_removed() -> None:
    with pytest.raises(TemplateError, match=r"turn 2 has a thought.*data\.reasoning=strip"):
        encoder_of("alpaca").encode(FIELD)
    assert texts(encoder_of("alpaca", reasoning="strip"), FIELD)[1] == "Hi.<|im_end|>"


@pytest.mark.parametrize(
    ("reasoning", "counted"), [("keep", None), ("strip", "removed"), ("mask", "kept without loss")]
)
def test_removed_and_masked_thoughts_are_counted(reasoning: str, counted: str | None) -> None:
    plain = [ASK, Message("assistant", "Hi.")]
    rows = [Conversation(messages, f"a:{n}") for n, messages in enumerate((FIELD, INLINE, plain))]
    report = DataReport()
    tokenize_conversations(rows, Conversations(encoder_of("tokenizer", reasoning=reasoning), 100), report)
    expected = {f"have thoughts, {counted} (data.reasoning={reasoning})": 2} if counted else {}
    assert report.counts == expected


def test_template_options_are_variables_of_the_chat_template() -> None:
    on, off = encoder_of("tokenizer"), encoder_of("tokenizer", template_options={"thinking": False})
    assert on.tokenizer.decode(on.encode_prompt([ASK])).endswith("assistant\n")
    assert off.tokenizer.decode(off.encode_prompt([ASK])).endswith("assistant\n<think>\n\n</think>\n\n")
    assert on.fingerprint() != off.fingerprint()
    assert texts(off, [ASK, Message("assistant", "Hi.")])[1] == "Hi.<|im_end|>"


def test_a_generated_reply_becomes_a_turn() -> None:
    encoder = encoder_of("tokenizer")
    ids = encoder.tokenizer.encode(f"{THOUGHT}Hi.<|im_end|>x", add_special_tokens=False)
    assert encoder.parse_reply(encoder.decode_reply(ids)) == FIELD[1]


HARMONY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}{% if m.thinking %}<|note|>{{ m.thinking }}<|im_start|>assistant"
    "{% endif %}<|say|>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
"""Parts of a reply are separated by special tokens."""
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|say|>{{ m.content }}<|note|><|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|say|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "text"), [(HARMONY, "<|note|>A greeting.<|im_start|>assistant<|say|>Hi."), (TWO_ENDS, "Hi.")]
)
def test_the_expected_reply_reads_as_a_generated_one(template: str, text: str) -> None:
    tokenizer = MAKERS["qwen"]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|note|>", "<|say|>"]})
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, "tokenizer", reasoning="keep" if template == HARMONY else "strip")
    encoded = encoder.encode(FIELD)
    trained = [i for i, kept in zip(encoded.input_ids, encoded.loss_mask, strict=True) if kept]
    assert encoder.decode_reply(trained) == render_reply(FIELD, encoder)[-1].content == text
    assert encoder.parse_reply(text).content == "Hi."


def test_thoughts_that_the_template_leaves_out_are_counted() -> None:
    tokenizer = MAKERS["qwen"]()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|><think>{% endif %}"
    )
    report = DataReport()
    kind = Conversations(Encoder(tokenizer, "tokenizer"), 100)
    data = tokenize_conversations([Conversation(FIELD, "a:1"), Conversation(INLINE, "a:2")], kind, report)
    row = data.train[1]
    assert (
        tokenizer.decode(row["input_ids"][row["labels"] != -100]) == "A greeting.\n</think>\n\nHi.<|im_end|>"
    )
    label = "have thoughts that this template leaves out, written where the model writes them"
    assert report.counts == {label: 2}
