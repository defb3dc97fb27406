"""Requests to an OpenAI-compatible endpoint and its answers: chat completions, and completions of a text."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from data_templates.segments import Message, with_context
from finetune.endpoint.settings import EndpointSettings
from finetune.recipe.errors import Problem, UserError

CONTENT_FILTER = "content_filter"
"""Finish reason, and error code of providers, for texts that their filter refuses."""
ROLES = ("system", "user", "assistant")

FORMAT = 1
"""Part of every key: raised when stored answers change."""


class MalformedAnswerError(ValueError):
    """An answer that is not JSON, or lacks what the API promises; asking again may help."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability.

    Attributes:
        token: its text.
        logprob: None for the first token of a prompt, which nothing predicts.
        offset: its first character in the text; None in chats, which have no offsets.
        top: the most likely tokens at its position, with their log-probabilities.
    """

    token: str
    logprob: float | None
    offset: int | None = None
    top: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EndpointAnswer:
    """An answer of an endpoint.

    Attributes:
        text: the reply, or the completion; with ``echo`` after the prompt.
        finish_reason: ``stop``, ``length``, ``content_filter`` or another word of the server.
        reasoning: the thought, where the server returns it in a field of its own.
        logprobs: of the text's tokens, () unless requested.
        prompt_tokens: as the server counts them; None if it does not.
        completion_tokens: as above.
        cached: whether it comes from the cache.
    """

    text: str
    finish_reason: str | None = None
    reasoning: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached: bool = False


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for the next reply of a conversation.

    Attributes:
        messages: turns of system, user and assistant.
        max_tokens: maximum length of the reply.
        temperature: 0 is greedy decoding.
        top_p: nucleus sampling; 1 samples from all tokens.
        seed: of the sample; requests that are equal but for their seed get different answers if the server
            supports seeds. None: no seed.
        stop: texts at which the reply ends.
        top_logprobs: alternatives per token with log-probabilities; 0: of the reply's tokens alone.
    """

    PATH: ClassVar[str] = "chat/completions"

    messages: Sequence[Message]
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    stop: Sequence[str] = ()
    top_logprobs: int | None = None

    def body(self, settings: EndpointSettings) -> dict[str, Any]:
        """Return the JSON object of the request.

        Raises:
            UserError: a turn has another role.
        """
        turns = [{"role": turn.role, "content": with_context(turn)} for turn in self.messages]
        if wrong := [turn.role for turn in self.messages if turn.role not in ROLES]:
            raise UserError(Problem("endpoint", f"a turn of role {wrong[0]}", f"turns of {', '.join(ROLES)}"))
        logprobs: dict[str, Any] = {}
        if self.top_logprobs is not None:
            logprobs = {
                "logprobs": True,
                **({"top_logprobs": self.top_logprobs} if self.top_logprobs else {}),
            }
        return _body(self, settings, {"messages": turns, **logprobs})

    def read_answer(self, content: Any) -> EndpointAnswer:
        """Return the answer in a response.

        Raises:
            MalformedAnswerError: it is not a chat completion.
        """
        choice = _first_choice(content)
        message = choice.get("message")
        if not isinstance(message, dict):
            raise MalformedAnswerError("the choice has no message")
        # OpenAI's models refuse in a field of its own; a reply of tool calls has no text.
        text = message.get("content") or message.get("refusal") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise MalformedAnswerError("the message is not a text")
        logprobs: list[TokenLogprob] = []
        if self.top_logprobs is not None:
            entries = _logprobs(choice).get("content") or []
            logprobs = [
                TokenLogprob(
                    entry["token"],
                    entry["logprob"],
                    top={other["token"]: other["logprob"] for other in entry.get("top_logprobs") or ()},
                )
                for entry in entries
            ]
        return _answer(content, choice, text, reasoning, logprobs)


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A request for the continuation of a text (the legacy completions API), without a chat template.

    Attributes:
        prompt: the text.
        max_tokens: maximum length of the continuation; 0 with ``echo`` scores the prompt alone, where the
            server allows it.
        temperature: 0 is greedy decoding.
        top_p: nucleus sampling; 1 samples from all tokens.
        seed: as in ``ChatRequest``.
        stop: texts at which the continuation ends.
        top_logprobs: alternatives per token with log-probabilities; 0: of the text's tokens alone.
        echo: whether text and log-probabilities begin with the prompt.
    """

    PATH: ClassVar[str] = "completions"

    prompt: str
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    echo: bool = False

    def body(self, settings: EndpointSettings) -> dict[str, Any]:
        """Return the JSON object of the request."""
        fields: dict[str, Any] = {"prompt": self.prompt}
        if self.top_logprobs is not None:
            fields["logprobs"] = self.top_logprobs
        return _body(self, settings, {**fields, **({"echo": True} if self.echo else {})})

    def read_answer(self, content: Any) -> EndpointAnswer:
        """Return the answer in a response.

        Raises:
            MalformedAnswerError: it is not a completion.
        """
        choice = _first_choice(content)
        if not isinstance(text := choice.get("text"), str):
            raise MalformedAnswerError("the choice has no text")
        logprobs: list[TokenLogprob] = []
        if self.top_logprobs is not None:
            columns = _logprobs(choice)
            tokens, values = columns["tokens"], columns["token_logprobs"]
            tops = columns.get("top_logprobs") or [None] * len(tokens)
            offsets = columns.get("text_offset") or [None] * len(tokens)
            logprobs = [
                TokenLogprob(token, value, offset, top or {})
                for token, value, offset, top in zip(tokens, values, offsets, tops, strict=True)
            ]
        return _answer(content, choice, text, "", logprobs)


EndpointRequest = ChatRequest | CompletionRequest


def read_response(request: EndpointRequest, text: str) -> EndpointAnswer:
    """Return the answer in the text of a successful response.

    Raises:
        MalformedAnswerError: it is not JSON, or not an answer to this kind of request.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedAnswerError(f"not JSON: {text[:80]!r}") from error
    try:
        return request.read_answer(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, MalformedAnswerError):
            raise
        raise MalformedAnswerError(f"unexpected fields ({type(error).__name__}: {error})") from error


def to_json(answer: EndpointAnswer) -> dict[str, Any]:
    """Return an answer as plain values for the cache."""
    return {name: value for name, value in asdict(answer).items() if name != "cached"}


def from_json(values: Mapping[str, Any]) -> EndpointAnswer:
    """Return an answer of the cache."""
    logprobs = tuple(TokenLogprob(**token) for token in values["logprobs"])
    return EndpointAnswer(**{**values, "logprobs": logprobs, "cached": True})


def error_of(content: Any) -> tuple[str, str]:
    """Return message and code of an error object of the API, "" where it has none."""
    error = content.get("error", content) if isinstance(content, dict) else None
    if isinstance(error, str):
        return error, ""
    if not isinstance(error, dict):
        return "", ""
    message = error.get("message") or error.get("detail") or ""
    return str(message), str(error.get("code") or error.get("type") or "")


def _body(request: EndpointRequest, settings: EndpointSettings, fields: Mapping[str, Any]) -> dict[str, Any]:
    body = {
        "model": settings.model,
        **fields,
        settings.token_limit_field: request.max_tokens,
        "temperature": request.temperature,
        # Not every server knows every field: those without effect are left out.
        **({"top_p": request.top_p} if request.top_p != 1 else {}),
        **({"stop": list(request.stop)} if request.stop else {}),
        **({"seed": request.seed} if request.seed is not None else {}),
        **settings.extra,
    }
    removed = {name for name, value in settings.extra.items() if value is None}
    return {name: value for name, value in body.items() if name not in removed}


def _first_choice(content: Any) -> dict[str, Any]:
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        message, _ = error_of(content)
        # Some routers report the error of a provider with status 200.
        raise MalformedAnswerError("no choices" + (f": {message}" if message else ""))
    return choices[0]


def _logprobs(choice: Mapping[str, Any]) -> dict[str, Any]:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        raise MalformedAnswerError("no log-probabilities, although they were requested")
    return logprobs


def _answer(
    content: Any, choice: Mapping[str, Any], text: str, reasoning: str, logprobs: Sequence[TokenLogprob]
) -> EndpointAnswer:
    usage = content.get("usage") or {}
    return EndpointAnswer(
        text=text,
        finish_reason=choice.get("finish_reason"),
        reasoning=reasoning,
        logprobs=tuple(logprobs),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
    )


def request_key(url: str, path: str, body: Mapping[str, Any], seed: int | None) -> str:
    """Return the key of a request: a digest of all that decides its answer.

    Args:
        url: base URL of the endpoint.
        path: of the API.
        body: the request, with model and sampling settings.
        seed: also where the request has no seed because the server takes none: samples stay different.
    """
    text = json.dumps([FORMAT, url, path, body, seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
