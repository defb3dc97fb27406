"""The exact text of the chat templates and the task templates; <s> and </s> are BOS and EOS."""

from data_templates.segments import Message

SYSTEM = Message("system", "Be brief.")
ASK = Message("user", "Add 2 and 3.")
ASK_WITH_INPUT = Message("user", "Add them.", context="2, 3")
ANSWER = Message("assistant", "5")
MORE = [Message("user", "And 4?"), Message("assistant", "9")]
LONG = [SYSTEM, ASK, ANSWER, *MORE]
GSM8K = Message("assistant", "He sold 48/2 = <<48/2=24>>24 in May.\nThat is 48+24 = <<48+24=72>>72.\n#### 72")

QWEN = (
    "<s><|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
)
KULLM = (
    "아래는 작업을 설명하는 명령어입니다. 요청을 적절히 완료하는 응답을 작성하세요.\n\n"
    "### 명령어:\nAdd 2 and 3.\n\n### 응답:\n"
)
KULLM_INPUT = (
    "아래는 작업을 설명하는 명령어와 추가 컨텍스트를 제공하는 입력이 짝을 이루는 예제입니다. "
    "요청을 적절히 완료하는 응답을 작성하세요.\n\n### 명령어:\nAdd them.\n\n### 입력:\n2, 3\n\n### 응답:\n"
)

CHATS = {
    "llama3": [
        (
            [ASK],
            "<s><|start_header_id|>user<|end_header_id|>\n\nAdd 2 and 3.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            [SYSTEM, ASK_WITH_INPUT, ANSWER],
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAdd them.\n\n2, 3<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n5<|eot_id|>",
        ),
    ],
    "mistral": [
        ([ASK], "<s>[INST] Add 2 and 3.[/INST]"),
        ([ASK_WITH_INPUT, ANSWER], "<s>[INST] Add them.\n\n2, 3[/INST] 5</s>"),
        ([SYSTEM, ASK, ANSWER], "<s>[INST] Be brief.\n\nAdd 2 and 3.[/INST] 5</s>"),
        (LONG, "<s>[INST] Add 2 and 3.[/INST] 5</s>[INST] Be brief.\n\nAnd 4?[/INST] 9</s>"),
    ],
    "mistral_v1": [
        ([ASK], "<s>[INST] Add 2 and 3. [/INST]"),
        ([ASK_WITH_INPUT, ANSWER], "<s>[INST] Add them.\n\n2, 3 [/INST] 5</s>"),
        (LONG, "<s>[INST] Be brief.\n\nAdd 2 and 3. [/INST] 5</s>[INST] And 4? [/INST] 9</s>"),
    ],
    "gemma": [
        ([ASK], "<s><start_of_turn>user\nAdd 2 and 3.<end_of_turn>\n<start_of_turn>model\n"),
        (
            [SYSTEM, ASK_WITH_INPUT, ANSWER, *MORE],
            "<s><start_of_turn>user\nBe brief.\n\nAdd them.\n\n2, 3<end_of_turn>\n"
            "<start_of_turn>model\n5<end_of_turn>\n"
            "<start_of_turn>user\nAnd 4?<end_of_turn>\n<start_of_turn>model\n9<end_of_turn>\n",
        ),
    ],
    "zephyr": [
        ([ASK], "<s><|user|>\nAdd 2 and 3.</s>\n<|assistant|>\n"),
        (
            [SYSTEM, ASK_WITH_INPUT, ANSWER, *MORE],
            "<s><|system|>\nBe brief.</s>\n<|user|>\nAdd them.\n\n2, 3</s>\n<|assistant|>\n5</s>\n"
            "<|user|>\nAnd 4?</s>\n<|assistant|>\n9</s>\n",
        ),
    ],
    "qwen": [
        ([ASK], f"{QWEN}<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n"),
        (
            [SYSTEM, ASK, ANSWER],
            "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.<|im_end|>\n"
            "<|im_start|>assistant\n5<|im_end|>\n",
        ),
        (
            [Message("system", ""), ASK],
            "<s><|im_start|>system\n<|im_end|>\n<|im_start|>user\nAdd 2 and 3.<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
    "toolcall": [
        (
            [SYSTEM, ASK_WITH_INPUT, ANSWER],
            "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd them.\n\n2, 3<|im_end|>\n"
            "<|im_start|>assistant\n5<|im_end|>\n",
        ),
        ([ASK], "<s><|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n"),
    ],
    "exaone": [
        ([ASK], "<s>[|system|][|endofturn|]\n[|user|]Add 2 and 3.\n[|assistant|]"),
        (
            [SYSTEM, ASK_WITH_INPUT, ANSWER, *MORE],
            "<s>[|system|]Be brief.[|endofturn|]\n[|user|]Add them.\n\n2, 3\n[|assistant|]5[|endofturn|]\n"
            "[|user|]And 4?\n[|assistant|]9[|endofturn|]\n",
        ),
    ],
    "hh": [
        ([ASK], "<s>\n\nHuman: Add 2 and 3.\n\nAssistant:"),
        (
            [SYSTEM, ASK_WITH_INPUT, ANSWER, *MORE],
            "<s>Be brief.\n\nHuman: Add them.\n\n2, 3\n\nAssistant: 5</s>"
            "\n\nHuman: And 4?\n\nAssistant: 9</s>",
        ),
    ],
    "kullm": [
        ([ASK, ANSWER], f"<s>{KULLM}5</s>"),
        ([ASK_WITH_INPUT, ANSWER], f"<s>{KULLM_INPUT}5</s>"),
        ([SYSTEM, ASK, ANSWER], "<s>Be brief.\n\n### 명령어:\nAdd 2 and 3.\n\n### 응답:\n5</s>"),
    ],
    "cot": [
        ([ASK], "<s>Q: Add 2 and 3.\nA:"),
        ([ASK, ANSWER], "<s>Q: Add 2 and 3.\nA: 5</s>"),
        ([SYSTEM, ASK_WITH_INPUT, ANSWER], "<s>Be brief.\n\nQ: Add them.\n\n2, 3\nA: 5</s>"),
        (
            [ASK, GSM8K],
            "<s>Q: Add 2 and 3.\nA: He sold 48/2 = 24 in May.\nThat is 48+24 = 72.\nThe answer is 72.</s>",
        ),
    ],
    # Which of the ten phrasings it is, test_flan.py asks.
    "flan": [
        ([ASK, ANSWER], "<s>Question: Add 2 and 3.\nAnswer:\n5</s>"),
        ([ASK_WITH_INPUT, ANSWER], "<s>Instructions: Add them.\nInput: 2, 3\nOutput:\n5</s>"),
        ([SYSTEM, ASK, ANSWER], "<s>Be brief.\n\nQuestion: Add 2 and 3.\nAnswer:\n5</s>"),
    ],
}
