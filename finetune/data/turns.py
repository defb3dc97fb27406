"""Turns of published conversations: roles, content parts, thoughts, tool calls, flags; merged to messages.

Read are the forms of OpenAI, ShareGPT, LLaMA-Factory, axolotl, ms-swift, torchtune and Hugging Face's chat
templates. ``unused_keys`` names what a turn has beyond that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_templates.segments import Message, Role
from finetune.data.contents import PART_KEYS, THOUGHTS, TURN_EXPECTED, turn_content, turn_thought
from finetune.data.fields import RowError, checked_text, has_content, json_cell, short_repr
from finetune.data.tool_calls import CALL_FORMAT, call_list, calls_to_json_lines

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "observation",
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "observation",
    "tool_response": "observation",
    "function": "observation",
    "ipython": "observation",
}
CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns whose content is a tool call (LLaMA-Factory, ms-swift)."""

TRAIN_FLAGS = (
    "trained",
    "train",  # axolotl
    "training",  # axolotl's former default
    "train_on_turn",
    "trainable",  # verl
    "weight",  # OpenAI and Mistral: 0 or 1
    "loss",  # ms-swift, XTuner
    "loss_weight",  # LLaMA-Factory 1
    "loss_mask",  # verl
)
"""Keys by which published layouts say whether a reply is trained."""
UNTRAINED_FLAG = "masked"
"""torchtune's flag, which says the opposite."""

TURNS_EXPECTED = "a list of turns with role and content (or from and value)"
_PLAIN_ROLES: dict[str, Role] = {
    name: role for name, role in ROLES.items() if role != "observation" and name not in CALL_ROLES
}


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message, the ids of its calls or of the call that it answers, and whether it is a call alone."""

    message: Message
    call_ids: tuple[Any, ...] = ()
    result_id: Any = None
    is_call: bool = False


def parse_turns(value: Any, field: str) -> list[Message]:
    """Return the messages of a list of turns; a single turn is read as a list of one.

    An empty system turn is none, and several system turns at the start are joined. A call in a turn of its
    own belongs to the reply before it. Results are in the order of their calls.

    Raises:
        RowError: it is something else.
    """
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not entries:
        raise RowError(field, f"found {short_repr(value)}", TURNS_EXPECTED)
    if plain := _plain_messages(entries, field):
        return plain
    turns = [_parse_turn(entry, f"{field}[{index}]") for index, entry in enumerate(entries)]
    kept = [turn for turn in turns if turn.message.role != "system" or turn.message.content.strip()]
    return [turn.message for turn in _sort_results(_merge_turns(kept or turns))]


def parse_history(value: Any, field: str) -> list[Message]:
    """Return LLaMA-Factory's ``history``, a list of [question, reply]; turns are accepted too.

    Raises:
        RowError: it is something else.
    """
    if not has_content(value):
        return []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        messages = []
        for index, (question, reply) in enumerate(value):
            messages.append(Message("user", checked_text(question, f"{field}[{index}][0]")))
            messages.append(Message("assistant", checked_text(reply, f"{field}[{index}][1]")))
        return messages
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return parse_turns(value, field)
    expected = "a list of [question, reply]"
    raise RowError(field, f"found {short_repr(value)}", expected, f"'data.ignore_columns=[{field}]'")


def is_plain(turn: Any) -> bool:
    """Return True for a turn that is a role and a text, and nothing else: most turns are."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return False
    if "role" in turn:
        return isinstance(turn.get("content"), str) and isinstance(turn["role"], str)
    return isinstance(turn.get("value"), str) and isinstance(turn.get("from"), str)


def _plain_messages(entries: list[Any], field: str) -> list[Message]:
    """Return the messages of questions and replies, after at most one system turn; [] for other turns.

    A fast path for most rows: it returns what the code for all turns does.
    """
    messages: list[Message] = []
    for turn in entries:
        if not is_plain(turn):
            return []
        role_key, text_key = ("role", "content") if "role" in turn else ("from", "value")
        role, text = _PLAIN_ROLES.get(turn[role_key]), turn[text_key]
        if role is None or (role == "system" and (messages or not text.strip())):
            return []
        messages.append(Message(role, checked_text(text, f"{field}[{len(messages)}].{text_key}")))
    return messages


def unused_keys(turn: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a turn that have content and are not read."""
    role_key, text_key = _role_and_text_keys(turn)
    name, text = turn.get(role_key), turn.get(text_key)
    read = {role_key, text_key, *TRAIN_FLAGS, UNTRAINED_FLAG}
    if ROLES.get(str(name)) == "observation":
        read |= {"tool_call_id", "name"}
    if ROLES.get(str(name)) == "assistant":
        read |= {key for key in THOUGHTS if isinstance(turn.get(key), str)}
        read |= {"refusal"} if text is None else set()
        if name not in CALL_ROLES:
            read |= {"tool_calls"} if has_content(turn.get("tool_calls")) else {"function_call"}
    yield from (key for key, value in turn.items() if key not in read and has_content(value))
    # What a part has beside its text, such as a cache mark.
    parts = [part for part in text if isinstance(part, dict)] if isinstance(text, list) else []
    extra = {key for part in parts for key in part.keys() - PART_KEYS if has_content(part[key])}
    yield from (f"{text_key}[].{key}" for key in sorted(extra))


def is_untrainable(turn: Mapping[str, Any]) -> bool:
    """Return True if a turn asks for loss that it cannot have: it is marked as trained and is no reply."""
    flagged = turn.keys() & {*TRAIN_FLAGS, UNTRAINED_FLAG}
    if not flagged or ROLES.get(str(turn.get(_role_and_text_keys(turn)[0]))) == "assistant":
        return False
    return any(turn[key] is not None and bool(turn[key]) != (key == UNTRAINED_FLAG) for key in flagged)


def looks_like_turns(value: Any) -> bool:
    """Return True for a turn, or a list of them."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _role_and_text_keys(turn: Mapping[str, Any]) -> tuple[str, str]:
    """Return the keys of a turn's role and text; tables have null where a row lacks a key."""
    role_key = "role" if turn.get("role") is not None else "from"
    filled = (key for key in ("content", "value") if turn.get(key) is not None)
    return role_key, next(filled, "value" if "value" in turn else "content")


def _parse_turn(turn: Any, field: str) -> _Turn:
    if not isinstance(turn, dict) or (turn.get("role") is None and turn.get("from") is None):
        raise RowError(field, f"found {short_repr(turn)}", TURN_EXPECTED)
    role_key, text_key = _role_and_text_keys(turn)
    name = turn[role_key]
    if not isinstance(name, str) or name not in ROLES:
        raise RowError(f"{field}.{role_key}", f"found {short_repr(name)}", f"one of {', '.join(ROLES)}")
    role, trained = ROLES[name], _parse_train_flag(turn, field)
    if name in CALL_ROLES:
        calls = _checked_calls(turn.get(text_key), f"{field}.{text_key}")
        thought = turn_thought(turn, "", field)
        return _Turn(Message(role, "", trained=trained, reasoning=thought, tool_calls=calls), is_call=True)
    if role != "assistant":
        _require_no_calls(turn, field)
        text, thought = turn_content(turn, text_key, field, role)
        if thought:
            raise RowError(f"{field}.{text_key}", "a thought", "thoughts of the assistant only")
        return _Turn(Message(role, text, trained=trained), result_id=turn.get("tool_call_id"))
    calls, call_ids = _parse_calls(turn, field)
    if turn.get(text_key) is None and has_content(turn.get("refusal")):
        text_key = "refusal"
    # OpenAI's content is null beside calls, and missing where only a thought was written.
    may_be_null = bool(calls) or any(has_content(turn.get(key)) for key in THOUGHTS)
    is_null = may_be_null and turn.get(text_key) is None
    text, thought = ("", "") if is_null else turn_content(turn, text_key, field, role)
    message = Message(
        role, text, trained=trained, reasoning=turn_thought(turn, thought, field), tool_calls=calls
    )
    return _Turn(message, call_ids)


def _parse_calls(turn: Mapping[str, Any], field: str) -> tuple[str, tuple[Any, ...]]:
    """Return a reply's tool calls as JSON lines, and their ids."""
    calls = json_cell(turn.get("tool_calls"))
    if has_content(calls):
        lines = _checked_calls(calls, f"{field}.tool_calls")
        ids = tuple(call.get("id") for call in call_list(calls))
        return lines, ids
    call = json_cell(turn.get("function_call"))
    return (_checked_calls(call, f"{field}.function_call"), ()) if has_content(call) else ("", ())


def _checked_calls(value: Any, field: str) -> str:
    try:
        return checked_text(calls_to_json_lines(value), field)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(field, str(error), CALL_FORMAT) from error


def _require_no_calls(turn: Mapping[str, Any], field: str) -> None:
    for key in ("tool_calls", "function_call"):
        if has_content(turn.get(key)):
            raise RowError(
                f"{field}.{key}", f"found {short_repr(turn[key])}", "tool calls of the assistant only"
            )


def _parse_train_flag(turn: Mapping[str, Any], field: str) -> bool:
    """Return whether a turn is trained; only replies use it."""
    flags = [(name, turn[name]) for name in TRAIN_FLAGS if turn.get(name) is not None]
    if turn.get(UNTRAINED_FLAG) is not None:
        flags.append((UNTRAINED_FLAG, turn[UNTRAINED_FLAG]))
    for name, value in flags:
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            expected = "true or 1, false or 0 (a reply is trained, or not)"
            raise RowError(f"{field}.{name}", f"found {short_repr(value)}", expected)
    return all(bool(value) != (name == UNTRAINED_FLAG) for name, value in flags)


def _merge_turns(turns: list[_Turn]) -> list[_Turn]:
    """Join the system turns at the start, and each call in a turn of its own with the reply before it."""
    merged: list[_Turn] = []
    for turn in turns:
        previous = merged[-1] if merged else turn
        if previous is not turn and turn.message.role == previous.message.role == "system":
            text = f"{previous.message.content}\n\n{turn.message.content}"
            merged[-1] = replace(previous, message=replace(previous.message, content=text))
        elif turn.is_call and previous is not turn and _takes_call(previous.message, turn.message):
            calls = filter(None, (previous.message.tool_calls, turn.message.tool_calls))
            thought = previous.message.reasoning or turn.message.reasoning
            message = replace(previous.message, reasoning=thought, tool_calls="\n".join(calls))
            merged[-1] = replace(previous, message=message)
        else:
            merged.append(turn)
    return merged


def _takes_call(reply: Message, call: Message) -> bool:
    """Return True if a call belongs to the reply before it: same flag, and no second thought."""
    same_flag = reply.role == "assistant" and reply.trained == call.trained
    return same_flag and not (reply.reasoning and call.reasoning)


def _sort_results(turns: list[_Turn]) -> list[_Turn]:
    """Return the turns with results in the order of their calls, where both have ids."""
    ordered: list[_Turn] = []
    ids: tuple[Any, ...] = ()
    start = 0
    for turn in turns:
        if turn.message.role != "observation":
            ids, start = turn.call_ids, len(ordered) + 1
        ordered.append(turn)
        results = ordered[start:]
        # Chat templates write no ids: the order alone says which result belongs to which call.
        if len(results) > 1 and all(result.result_id in ids for result in results):
            ordered[start:] = sorted(results, key=lambda result: ids.index(result.result_id))
    return ordered
