"""Each template's text, byte for byte, as in its source; BOS and EOS are shown as <s> and </s>."""

import pytest
from golden_chats import ANSWER, ASK, ASK_WITH_INPUT, CHATS, MORE, SYSTEM

from data_templates.segments import Message, TemplateError, render
from finetune.recipe.discovery import load_plugin, plugin_names

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd 2 and 3.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd them.\n\n### Input:\n2, 3\n\n### Response:"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

GOLDEN = CHATS | {
    "alpaca": [
        ([ASK], f"<s>{ALPACA}"),
        ([ASK, ANSWER], f"<s>{ALPACA}5</s>"),
        ([ASK_WITH_INPUT, ANSWER], f"<s>{ALPACA_INPUT}5</s>"),
        ([SYSTEM, ASK, ANSWER], "<s>Be brief.\n\n### Instruction:\nAdd 2 and 3.\n\n### Response:5</s>"),
        (
            [SYSTEM, ASK_WITH_INPUT, ANSWER],
            "<s>Be brief.\n\n### Instruction:\nAdd them.\n\n### Input:\n2, 3\n\n### Response:5</s>",
        ),
        ([Message("system", " "), ASK, ANSWER], f"<s>{ALPACA}5</s>"),
        ([Message("user", "Add 2 and 3.", context="\n"), ANSWER], f"<s>{ALPACA}5</s>"),
    ],
    "koalpaca": [
        ([ASK], "<s>### 질문: Add 2 and 3.\n\n### 답변:"),
        ([ASK, ANSWER], "<s>### 질문: Add 2 and 3.\n\n### 답변: 5</s>"),
        ([ASK_WITH_INPUT, ANSWER], "<s>### 질문: Add them.\n\n### 맥락: 2, 3\n\n### 답변: 5</s>"),
        ([SYSTEM, ASK, ANSWER], "<s>Be brief.\n\n### 질문: Add 2 and 3.\n\n### 답변: 5</s>"),
        (
            [Message("user", "더하면?"), Message("assistant", "다섯")],
            "<s>### 질문: 더하면?\n\n### 답변: 다섯</s>",
        ),
    ],
    "classify": [
        ([ASK], "<s>Add 2 and 3.\n\n### Label:\n"),
        ([SYSTEM, ASK_WITH_INPUT, ANSWER], "<s>Be brief.\n\nAdd them.\n\n2, 3\n\n### Label:\n5</s>"),
    ],
    "plain": [
        ([ASK], "<s>Add 2 and 3."),
        ([ASK, ANSWER], "<s>Add 2 and 3.5</s>"),
        ([ASK_WITH_INPUT, ANSWER], "<s>Add them.\n\n2, 35</s>"),
        ([SYSTEM, ASK, Message("assistant", " five\n")], "<s>Be brief.\n\nAdd 2 and 3. five\n</s>"),
    ],
    "vicuna": [
        ([ASK], f"<s>{VICUNA}USER: Add 2 and 3. ASSISTANT:"),
        ([ASK, ANSWER], f"<s>{VICUNA}USER: Add 2 and 3. ASSISTANT: 5</s>"),
        ([ASK_WITH_INPUT, ANSWER], f"<s>{VICUNA}USER: Add them.\n\n2, 3 ASSISTANT: 5</s>"),
        ([SYSTEM, ASK, ANSWER], "<s>Be brief. USER: Add 2 and 3. ASSISTANT: 5</s>"),
        ([Message("system", ""), ASK], f"<s>{VICUNA}USER: Add 2 and 3. ASSISTANT:"),
        (
            [ASK, ANSWER, *MORE],
            f"<s>{VICUNA}USER: Add 2 and 3. ASSISTANT: 5</s>USER: And 4? ASSISTANT: 9</s>",
        ),
        ([ASK, ANSWER, MORE[0]], f"<s>{VICUNA}USER: Add 2 and 3. ASSISTANT: 5</s>USER: And 4? ASSISTANT:"),
    ],
    "chatml": [
        ([ASK], "<s><|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n"),
        ([ASK, ANSWER], "<s><|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"),
        (
            [SYSTEM, ASK_WITH_INPUT, ANSWER],
            "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd them.\n\n2, 3<|im_end|>\n"
            "<|im_start|>assistant\n5<|im_end|>\n",
        ),
        (
            [ASK, ANSWER, *MORE],
            "<s><|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
            "<|im_start|>user\nAnd 4?<|im_end|>\n<|im_start|>assistant\n9<|im_end|>\n",
        ),
    ],
    "llama2": [
        ([ASK], "<s>[INST] Add 2 and 3. [/INST]"),
        ([ASK, ANSWER], "<s>[INST] Add 2 and 3. [/INST] 5 </s>"),
        ([ASK_WITH_INPUT, ANSWER], "<s>[INST] Add them.\n\n2, 3 [/INST] 5 </s>"),
        (
            [SYSTEM, ASK, ANSWER, *MORE],
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd 2 and 3. [/INST] 5 </s>"
            "<s>[INST] And 4? [/INST] 9 </s>",
        ),
    ],
}


def to_text(segments):
    """Return a rendering as text."""
    tokens = {"bos": "<s>", "eos": "</s>"}
    return "".join(segment.text or tokens.get(segment.kind, "") for segment in segments)


@pytest.mark.parametrize(
    ("name", "messages", "expected"), [(name, *case) for name, cases in GOLDEN.items() for case in cases]
)
def test_text_is_exact(name, messages, expected):
    template = load_plugin("data_templates", name, where="test").TEMPLATE
    segments, written_apart = render(template, messages)
    assert to_text(segments) == expected
    assert written_apart == 0


def test_no_shipped_template_is_without_golden_texts():
    # `model` has no text of its own; a new template brings its golden texts along.
    assert set(GOLDEN) == set(plugin_names("data_templates")) - {"tokenizer"}


@pytest.mark.parametrize("name", ["alpaca", "classify", "koalpaca", "plain", "kullm", "cot", "flan"])
def test_single_turn_templates_suggest_others_for_longer_conversations(name):
    template = load_plugin("data_templates", name, where="test").TEMPLATE
    with pytest.raises(TemplateError, match=f"'{name}' is single-turn.* has 4 turns.*'vicuna', 'chatml'"):
        render(template, [ASK, ANSWER, *MORE])


@pytest.mark.parametrize(
    "roles",
    [
        [],
        ["system"],
        ["assistant"],
        ["user", "user"],
        ["user", "assistant", "assistant"],
        ["user", "system", "assistant"],
        ["system", "system", "user"],
        ["system", "assistant"],
    ],
)
def test_an_invalid_order_of_roles_is_rejected(roles):
    template = load_plugin("data_templates", "chatml", where="test").TEMPLATE
    with pytest.raises(
        TemplateError, match="expected an optional system turn, then alternating user and assistant"
    ):
        render(template, [Message(role, "x") for role in roles])


@pytest.mark.parametrize("message", [Message("user", "a\ud83d"), Message("user", "a", context="\udc00")])
def test_an_unpaired_surrogate_is_rejected_before_tokenization(message):
    template = load_plugin("data_templates", "alpaca", where="test").TEMPLATE
    with pytest.raises(TemplateError, match="an unpaired surrogate .*expected valid Unicode"):
        render(template, [message])
