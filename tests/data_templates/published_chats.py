"""Published chat templates (Jinja), and how `transformers` renders them."""

import json
from importlib.util import find_spec
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

TRL = Path(find_spec("trl").origin).with_name("chat_templates")
"""TRL ships the Hub's templates, byte for byte, to recognize a model by them."""

ZEPHYR = (  # HuggingFaceH4/zephyr-7b-beta, tokenizer_config.json
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
EXAONE = (  # LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct, tokenizer_config.json
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '[|system|][|endofturn|]\n' }}{% endif %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{% if message['role'] == 'user' %}{{ '\n' }}{% else %}{{ '[|endofturn|]\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
MISTRAL = (  # mistralai/Mistral-7B-Instruct-v0.3, tokenizer_config.json, without its tools
    '{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}'
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    '{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}'
    '{{- bos_token }}{%- for message in loop_messages %}{%- if message["role"] == "user" %}'
    "{%- if (message == user_messages[-1]) and system_message is defined %}"
    '{{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}'
    '{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}'
    '{%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}'
    "{%- endif %}{%- endfor %}"
)


def trl(name):
    """Return a template that TRL ships."""
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8")


def rendered(template, messages, *, tools=None, opened=False):
    """Render as `transformers` does: its environment, its tojson."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": opened}
    return environment.from_string(template).render(messages=messages, tools=tools, **names)
