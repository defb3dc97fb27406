"""Small chat templates of our own, one of each kind that models publish, and conversations for them."""

import json
from dataclasses import dataclass, field

from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_templates.segments import Message, TemplateError
from data_templates.tokenizer import bind_chat_template


@dataclass(frozen=True)
class Kind:
    """A template, its special tokens, the models that publish this kind, and what it can take."""

    like: str
    text: str
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    thoughts: bool = False
    tools: bool = False
    added: tuple[str, ...] = field(default=())


def _turns(header, body, footer, prompt, *, before=""):
    """Return a template that writes each turn between a header and a footer."""
    return (
        before
        + "{% for m in messages %}"
        + header
        + body
        + footer
        + "{% endfor %}{% if add_generation_prompt %}"
        + prompt
        + "{% endif %}"
    )


HEAD, END, OPEN = "<|im_start|>{{ m.role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n"
CONTENT = "{{ m.content or '' }}"
LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
IN_LAST_TURN = "m.role == 'assistant' and loop.index0 > ns.last"
FIELD_THOUGHT = "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
JSON_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
)
XML_CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% endfor %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
)
WITHOUT_THOUGHT = "{{ (m.content or '').split('</think>')[-1] }}"
HARMONY = (
    "{% if tools %}<|start|>developer<|message|>{% for t in tools %}type {{ t.function.name }}{% endfor %}"
    "<|end|>{% endif %}{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{% set later = namespace(final=false) %}{% for n in messages[loop.index:] %}"
    "{% if n.role == 'assistant' and not n.tool_calls %}{% set later.final = true %}{% endif %}{% endfor %}"
    "{% if m.thinking and not later.final %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant to="
    "functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_TOKENS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")
GLM = (
    "[gMASK]<sop>" + LAST_USER + "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>\n<think>"
    "{% if loop.index0 > ns.last %}{{ m.reasoning_content or '' }}{% endif %}</think>"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n' }}<tool_call>{{ c.function.name }}\n"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NANO = (  # the last reply is written after the loop
    "{% set last = messages[-1] if messages[-1].role == 'assistant' else none %}"
    "{% for m in (messages[:-1] if last else messages) %}"
    "<SPECIAL_11>{{ m.role }}\n" + WITHOUT_THOUGHT + "\n"
    "{% if m.role == 'assistant' %}<SPECIAL_12>\n{% endif %}{% endfor %}"
    "{% if last or add_generation_prompt %}<SPECIAL_11>assistant\n<think>\n\n{% endif %}"
    "{% if last %}{{ last.content.strip() }}\n<SPECIAL_12>\n\n{% endif %}"
)
CALL_BY_TEXT = (  # arguments are text; a reply of calls only has content null
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}<|Assistant|>"
    "{% for c in m.tool_calls %}<|call|>{{ c.function.name }}\n"
    "```json\n{{ '' + c.function.arguments }}\n```{% endfor %}<|end|>"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}<|output|>{{ m.content }}{% elif m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
PARTS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<|start|>assistant to=self<|message|>{{ m.reasoning_content }}"
    "<|eom|>{% endif %}"
    "{% for c in m.tool_calls or [] %}<|start|>assistant to={{ c.function.name }}<|message|>"
    "{{ c.function.arguments | tojson }}<|eot|>{% endfor %}"
    "{% if m.content %}<|start|>assistant to=user<|message|>{{ m.content }}<|eot|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THINKS_LAST = _turns(
    HEAD, "{% if " + IN_LAST_TURN + " %}" + FIELD_THOUGHT + "{% endif %}" + CONTENT + JSON_CALLS, END, OPEN
)

KINDS = {
    "chatml": Kind("Qwen2.5, Yi", _turns(HEAD, CONTENT, END, OPEN)),
    "tools": Kind(
        "Hermes, Qwen3-Instruct-2507", TOOLS + _turns(HEAD, CONTENT + JSON_CALLS, END, OPEN), tools=True
    ),
    "header": Kind(
        "Llama 3",
        _turns(
            "<|head|>{{ m.role }}<|/head|>\n\n",
            "{{ m.content | trim }}",
            "<|eot|>",
            "<|head|>assistant<|/head|>\n\n",
            before="{{ bos_token }}",
        ),
        ("<|head|>", "<|/head|>", "<|eot|>", "<s>", "</s>"),
    ),
    "inst": Kind(
        "Llama 2, Mistral",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        ("<s>", "</s>"),
    ),
    "text": Kind("Vicuna", _turns("### {{ m.role }}: ", CONTENT, "\n", "### assistant: "), ()),
    "two ends": Kind(
        "Command R, Aya",
        _turns(
            "<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|response|>{% endif %}",
            CONTENT,
            "{% if m.role == 'assistant' %}<|/response|>{% endif %}<|im_end|>",
            "<|im_start|>assistant<|response|>",
        ),
        ("<|im_start|>", "<|im_end|>", "<|response|>", "<|/response|>"),
    ),
    "eos after the end": Kind(
        "Phi-3",
        _turns(HEAD, CONTENT, END, OPEN) + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ("<|im_start|>", "<|im_end|>", "</s>"),
    ),
    "end once": Kind(
        "Mistral's early tokenizers",
        _turns(HEAD, CONTENT, "\n{% if loop.last and m.role == 'assistant' %}<|im_end|>{% endif %}", OPEN),
    ),
    "no end": Kind(
        "GLM-4.5", GLM, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"), thoughts=True
    ),
    "harmony": Kind("gpt-oss", HARMONY, HARMONY_TOKENS, thoughts=True, tools=True),
    "recipients": Kind("Muse", PARTS, ("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"), thoughts=True),
    "thinks last": Kind("Qwen3", LAST_USER + TOOLS + THINKS_LAST, thoughts=True, tools=True),
    "opens thought": Kind(
        "Qwen3.5, Qwen3.6",
        LAST_USER + TOOLS + THINKS_LAST.replace(JSON_CALLS, XML_CALLS).replace(OPEN, OPEN + "<think>\n"),
        thoughts=True,
        tools=True,
    ),
    "opens, removes": Kind(
        "DeepSeek-R1-Distill, QwQ", _turns(HEAD, WITHOUT_THOUGHT, END, OPEN + "<think>\n"), thoughts=True
    ),
    "opens, empty": Kind(
        "Nemotron 3",
        _turns(
            HEAD,
            "{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
            + FIELD_THOUGHT.replace("\n\n", "\n")
            + "{% else %}<think></think>{% endif %}{% endif %}"
            + CONTENT,
            END,
            OPEN + "<think>\n",
        ),
        thoughts=True,
    ),
    "opens, last apart": Kind("Nemotron Nano 2", NANO, ("<SPECIAL_11>", "<SPECIAL_12>"), thoughts=True),
    "removes": Kind("DeepSeek-R1", _turns(HEAD, WITHOUT_THOUGHT, END, OPEN), thoughts=True),
    "inline": Kind("SmolLM3", _turns(HEAD, CONTENT, END, OPEN), thoughts=True, added=("<think>", "</think>")),
    "fills": Kind(
        "Kimi K2",
        _turns(HEAD, "{% if m.role == 'assistant' %}<think></think>{% endif %}" + CONTENT, END, OPEN),
        thoughts=True,
    ),
    "closes thought": Kind(
        "Qwen3.5-2B, EXAONE 4",
        LAST_USER + THINKS_LAST.replace(JSON_CALLS, "").replace(OPEN, OPEN + "<think>\n\n</think>\n\n"),
    ),
    "prompt closes thought": Kind(
        "Gemma 4 without thinking", _turns(HEAD, CONTENT, END, OPEN + "<|channel>thought\n<channel|>")
    ),
    "call by text": Kind(
        "DeepSeek V3", CALL_BY_TEXT, ("<|User|>", "<|Assistant|>", "<|call|>", "<|output|>", "<|end|>")
    ),
}


def chat_of(kind):
    """Return a kind as a function, rendered as `transformers` does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(kind.text)

    def chat(messages, opened, tools=None):
        try:
            names = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": opened}
            return template.render(messages=messages, tools=tools, **names)
        except Exception as error:
            raise TemplateError(f"rejected: {error}") from error

    return chat


def bound(name):
    """Return a kind as a bound template."""
    kind = KINDS[name]
    return bind_chat_template(chat_of(kind), special_tokens=kind.special, added_tokens=kind.added)


def user(text):
    return Message("user", text)


def reply(text, **parts):
    return Message("assistant", text, **parts)


def call(**arguments):
    return json.dumps({"name": "area", "arguments": arguments}, ensure_ascii=False)


SYSTEM = Message("system", "Be brief.")
WIDTH = {"type": "integer", "description": "cm"}
PARAMETERS = {"type": "object", "properties": {"w": WIDTH}, "required": ["w"]}
AREA = {"name": "area", "description": "Area of a square", "parameters": PARAMETERS}
TOOL = Message("tools", json.dumps({"type": "function", "function": AREA}))
RESULT = Message("observation", "25")
