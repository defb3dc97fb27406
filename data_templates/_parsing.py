"""Thoughts and tool calls in the text of a reply, in the formats that models write."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from data_templates.segments import Message, Parsed, TemplateError

PROBE_TEXT, PROBE_THOUGHT = "\ue0000\ue001", "\ue0001\ue001"
THOUGHT = re.compile(r"\s*<think>\n?(.*?)\n?</think>(?:\n\n|\s*)", re.DOTALL)
"""A thought at the beginning of a reply."""
NAME = r"(?:functions\.)?([A-Za-z_][\w.-]*)"
NAME_BEFORE_JSON = re.compile(NAME + r"(?::\d+)?(?:\s|<[^<>{}]*>|commentary|json|`)*\Z")
"""A function's name, and what may stand between it and its arguments."""
XML_CALL = re.compile(r"<function=([^>\n]+)>\n?(.*?)</function>", re.DOTALL)
XML_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
PAIRS_CALL = re.compile(r"<tool_call>([\w.-]+)\n?((?:<arg_key>.*?</arg_value>\s*)*)</tool_call>", re.DOTALL)
PAIRS_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
PYTHON_CALL = re.compile(r"[A-Za-z_]\w*\((?:[^()]|\([^()]*\))*\)")
MARKUP_BEFORE_CALL = re.compile(r"(?:\s|<[^<>]*>|\[[A-Z_]+\]|\[|to=|function|```python)*\Z")
IDENTIFIER = re.compile(r',?"(?:id|call_id)":"[^"]*"|(?<=\w):\d+(?=<)')
"""The id of a call, which is not a part of what the model says."""
HERMES_CALLS = re.compile(r"(?:\A|\n)((?:<tool_call>\n[^\n]*\n</tool_call>\n?)+)\Z")


def split_thought(text: str) -> tuple[str, str]:
    r"""Return the thought at the beginning of a reply, "" if there is none, and the rest.

    >>> split_thought("<think>\nTwo and two.\n</think>\n\n4")
    ('Two and two.', '4')
    """
    match = THOUGHT.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)


def parse_thought(text: str) -> Parsed:
    """Return a reply's thought and text."""
    reasoning, content = split_thought(text)
    return Parsed(content, reasoning)


def parse_hermes(text: str) -> Parsed:
    """Return a reply's thought, text and calls in ``<tool_call>`` tags; what is no call stays text."""
    reasoning, rest = split_thought(text)
    match = HERMES_CALLS.search(rest)
    lines = re.findall(r"<tool_call>\n([^\n]*)\n</tool_call>", match[1]) if match else []
    if match and all(_to_call(_load(line)) for line in lines):
        return Parsed(rest[: match.start()], reasoning, "\n".join(lines))
    return Parsed(rest, reasoning)


def guess_calls(text: str) -> Iterator[tuple[str, str]]:
    """Yield what a text may be: the text before its calls, and the calls as JSON lines.

    The caller decides by rendering a guess with its template.
    """
    for find in (_json_calls, _xml_calls, _pair_calls, _python_calls):
        calls = list(find(text))
        if calls:
            start = calls[0][0]
            before = text[: start - len(MARKUP_BEFORE_CALL.search(text[:start])[0])]  # type: ignore[index]
            lines = "\n".join(json.dumps(call, ensure_ascii=False) for _, call in calls)
            yield before, lines
            yield "", lines


class ReplyParser:
    """Parses replies of a template that is known by what it writes.

    ``write`` returns thought and text of a reply as the template writes them, and raises TemplateError.
    """

    def __init__(self, write: Callable[[Message], tuple[str, str]]) -> None:
        """Store the function; nothing is rendered before the first reply is parsed."""
        self._write = write

    def parse(self, text: str) -> Parsed:
        """Return a reply's parts if the template writes them as this text, else the text as content."""
        wanted = _comparable(text)
        for parsed in self._guesses(text):
            message = Message(
                "assistant", parsed.content, reasoning=parsed.reasoning, tool_calls=parsed.tool_calls
            )
            try:
                written = "".join(self._write(message))
            except TemplateError:
                continue
            if _comparable(written) == wanted:
                return parsed
        return Parsed(text)

    def _guesses(self, text: str) -> Iterator[Parsed]:
        reasoning, rest = self._split_thought(text)
        for before, calls in guess_calls(rest):
            yield Parsed(self._strip_lead(before), reasoning, calls)
        yield Parsed(self._strip_lead(rest), reasoning)

    def _split_thought(self, text: str) -> tuple[str, str]:
        opening, closing, _ = self._thought_markup
        start = text.lstrip()
        if not closing or not start.startswith(opening) or closing not in start:
            return "", text
        thought, rest = start[len(opening) :].split(closing, 1)
        return thought.strip(), rest

    def _strip_lead(self, text: str) -> str:
        """Return a text without what the template writes before a reply's text."""
        text = text.strip()
        for lead in (self._thought_markup[2], self._lead):
            if lead and text.startswith(lead):
                return text[len(lead) :].strip()
        return text

    @cached_property
    def _thought_markup(self) -> tuple[str, str, str]:
        """Return the text before a thought, after it, and before the reply's text; "" without thoughts."""
        try:
            thought, text = self._write(Message("assistant", PROBE_TEXT, reasoning=PROBE_THOUGHT))
        except TemplateError:
            return "", "", ""
        opening, _, closing = thought.partition(PROBE_THOUGHT)
        return opening.strip(), closing.strip(), text.partition(PROBE_TEXT)[0].strip()

    @cached_property
    def _lead(self) -> str:
        """Return the text before the text of a reply without a thought."""
        try:
            return "".join(self._write(Message("assistant", PROBE_TEXT))).partition(PROBE_TEXT)[0].strip()
        except TemplateError:
            return ""


def _comparable(text: str) -> str:
    """Return a text without whitespace and without the ids of calls."""
    return IDENTIFIER.sub("", "".join(text.split()))


def _json_calls(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the calls that are JSON, or a name before its arguments as JSON, with their positions."""
    decoder = json.JSONDecoder()
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError):
            position = text.find("{", position + 1)
            continue
        name = NAME_BEFORE_JSON.search(text[:position])
        if call := _to_call(value):
            yield position, call
        elif name:
            yield name.start(), {"name": name[1], "arguments": value}
        position = text.find("{", end)


def _xml_calls(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for match in XML_CALL.finditer(text):
        arguments = {name: _value(value) for name, value in XML_ARGUMENT.findall(match[2])}
        yield match.start(), {"name": match[1], "arguments": arguments}


def _pair_calls(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for match in PAIRS_CALL.finditer(text):
        arguments = {name: _value(value) for name, value in PAIRS_ARGUMENT.findall(match[2])}
        yield match.start(), {"name": match[1], "arguments": arguments}


def _python_calls(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for match in PYTHON_CALL.finditer(text):
        try:
            call = ast.parse(match[0], mode="eval").body
            assert isinstance(call, ast.Call)
            arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        except (SyntaxError, ValueError, RecursionError):
            continue
        yield match.start(), {"name": match[0].partition("(")[0], "arguments": arguments}


def _to_call(value: Any) -> dict[str, Any] | None:
    """Return an object as a call, None if it is no call; arguments may have other names, or be JSON text."""
    name = value.get("name", value.get("tool_name")) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(name, str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    arguments = _load(arguments) if isinstance(arguments, str) else arguments
    return {"name": name, "arguments": arguments} if isinstance(arguments, dict) else None


def _value(text: str) -> Any:
    """Return an argument that was written without its type: numbers, lists and objects are JSON."""
    value = _load(text)
    return text if value is None else value


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
