"""Content of a turn: text, a list of parts, the result of a tool; and the thought of a reply."""

import json
from collections.abc import Mapping
from typing import Any

from data_templates.segments import Role
from finetune.data.fields import RowError, checked_text, short_repr

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a reply's thought: DeepSeek's API and Qwen3; OpenRouter, vLLM and NVIDIA; gpt-oss."""

TURN_EXPECTED = "an object with role and content (or from and value)"
PARTS_EXPECTED = "text parts, {type: text, text: ...}: images, audio and video are not read"

_TEXT_TYPES = (None, "text", "input_text", "output_text")
_THOUGHT_TYPES = ("thinking", "reasoning")
_MEDIA_TYPES = (
    "image",
    "image_url",
    "input_image",
    "audio",
    "audio_url",
    "input_audio",
    "video",
    "video_url",
    "file",
)
_RESULT_TYPES = (*_TEXT_TYPES, *_THOUGHT_TYPES, *_MEDIA_TYPES)
PART_KEYS = frozenset({"type", "text", "content", "value", "thinking", "reasoning"})


def turn_content(turn: Mapping[str, Any], text_key: str, field: str, role: Role) -> tuple[str, str]:
    """Return the text of a turn, and the thought among its parts."""
    value, where = turn.get(text_key), f"{field}.{text_key}"
    if isinstance(value, str):
        return checked_text(value, where), ""
    if text_key not in turn:
        raise RowError(field, f"found {short_repr(dict(turn))}", TURN_EXPECTED)
    # The result of a tool may be any JSON, also a list of objects that have a type.
    if role == "observation" and isinstance(value, (dict, list)) and not _are_parts(value, _RESULT_TYPES):
        text = json.dumps(value, ensure_ascii=False, default=str)
        return checked_text(text, where), ""
    if isinstance(value, list) and all(isinstance(part, (str, dict)) for part in value):
        return _join_parts(value, where)
    return checked_text(value, where), ""


def _are_parts(value: Any, types: tuple[str | None, ...]) -> bool:
    """Return True for a list of texts and content parts of these types."""
    parts = value if isinstance(value, list) else [None]
    return all(isinstance(part, str) or _part_type(part) in types for part in parts)


def _part_type(part: Any) -> Any:
    """Return a part's type: None for a plain ``{"text": ...}``, "" for what is no part."""
    return part.get("type") if isinstance(part, dict) and ("type" in part or "text" in part) else ""


def _join_parts(parts: list[Any], field: str) -> tuple[str, str]:
    """Return the text and the thought of a list of content parts, joined without a separator."""
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(parts):
        where = f"{field}[{index}]"
        if isinstance(part, str):
            texts.append(checked_text(part, where))
        elif _part_type(part) in _TEXT_TYPES:
            texts.append(checked_text(_filled(part, "text", "content", "value"), where))
        elif _part_type(part) in _THOUGHT_TYPES:
            if texts:
                raise RowError(where, "a thought after the text", "a thought before the text of its turn")
            thought = _filled(part, "thinking", "reasoning", "text", "value")
            is_list = isinstance(thought, list)
            thoughts.append(_join_parts(thought, where)[0] if is_list else checked_text(thought, where))
        else:
            raise RowError(where, f"found {short_repr(part)}", PARTS_EXPECTED)
    return "".join(texts), "".join(thoughts)


def _filled(part: Mapping[str, Any], *names: str) -> Any:
    """Return the first of these values that is not null."""
    return next((part[name] for name in names if part.get(name) is not None), None)


def turn_thought(turn: Mapping[str, Any], from_parts: str, field: str) -> str:
    """Return a reply's thought; two different ones are an error."""
    thoughts = {
        key: checked_text(turn[key], f"{field}.{key}")
        for key in THOUGHTS
        if isinstance(turn.get(key), str) and turn[key].strip()
    }
    thoughts |= {"content": from_parts} if from_parts.strip() else {}
    if len({text.strip() for text in thoughts.values()}) > 1:
        first, second, *_ = thoughts
        actual = f"found {short_repr(thoughts[second])}, but '{first}' has another thought"
        raise RowError(f"{field}.{second}", actual, "one thought per reply")
    return next(iter(thoughts.values()), "")
