"""What an endpoint's response means: an answer, a failure that may pass, or an error of the user."""

import json
import os
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2

from finetune.endpoint.messages import (
    CONTENT_FILTER,
    EndpointAnswer,
    EndpointRequest,
    MalformedAnswerError,
    error_of,
    read_response,
)
from finetune.endpoint.settings import EndpointSettings
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of

PASSING_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses after which the same request may succeed. 529: overloaded, of some providers."""
RATE_LIMIT = 429
NO_QUOTA = "insufficient_quota"
"""Code of OpenAI's 429 that no waiting ends: the account has no credit."""
LONGEST_WAIT = 300.0
"""Longest Retry-After, in seconds, that a run waits for."""
MAX_SHOWN_CHARACTERS = 300
MIN_SECRET_LENGTH = 8
"""Shorter keys, such as `EMPTY` of local servers, are no secrets and may be words of an answer."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure that may pass.

    Attributes:
        problem: what is reported if it does not.
        wait: seconds that the server asks for; None: it does not say.
        rate_limited: whether it concerns all requests, and not this one.
    """

    problem: Problem
    wait: float | None = None
    rate_limited: bool = False


class ApiKey:
    """The API key of an endpoint, read from its environment variable; texts never contain it."""

    def __init__(self, settings: EndpointSettings) -> None:
        """Read the key.

        Raises:
            UserError: the settings name a variable that is not set.
        """
        name = settings.api_key_env
        chosen = "api_key_env" in settings.model_fields_set
        self._value = os.environ.get(name, "").strip()
        if chosen and not self._value:
            actual = f"the environment variable {name} is not set"
            raise UserError(Problem("api_key_env", actual, "the API key in it", f"export {name}=..."))
        parts = urlsplit(settings.url)
        # The key of another provider, which is often in the environment, is not sent in the clear.
        self.withheld = bool(
            self._value and not chosen and parts.scheme == "http" and parts.hostname not in LOCAL_HOSTS
        )
        if self.withheld:
            self._value = ""
        if not self._value.isascii():
            raise UserError(Problem("api_key_env", f"{name} has a character outside ASCII", "an API key"))

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._value}"} if self._value else {}

    def redact(self, text: str) -> str:
        """Return a text of the server without the key."""
        return text.replace(self._value, "***") if len(self._value) >= MIN_SECRET_LENGTH else text

    def repair(self, name: str) -> str:
        """Return what to do about a key that the server does not accept."""
        if self.withheld:
            return f"{name} is not sent to another host without https; `api_key_env: {name}` sends it"
        return f"check the value of {name}" if self._value else f"export {name}=..., the provider's key"


def connection_failure(settings: EndpointSettings, error: httpx2.RequestError) -> Failure:
    """Return the failure of a request without a response."""
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        actual = f"no answer within {settings.timeout:g} s"
        repair = "set a longer `timeout`, or fewer requests at a time with `concurrency`"
    elif isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
        actual, repair = f"no connection: {error}", "start the server, or correct `url`"
    else:
        actual, repair = f"the connection was lost: {error}", "see the server's log"
    return Failure(Problem(_where(settings), actual, "an endpoint that answers", repair))


def read_http_response(
    settings: EndpointSettings, request: EndpointRequest, response: httpx2.Response, key: ApiKey
) -> EndpointAnswer | Failure:
    """Return the answer of a response, or its failure.

    Raises:
        UserError: a failure that the same request will meet again.
    """
    text = key.redact(response.text)
    if not response.is_success:
        return _read_error(settings, response, text, key)
    try:
        answer = read_response(request, text)
    except MalformedAnswerError as error:
        actual = f"an answer that cannot be used: {error}"
        expected = f"the JSON of an OpenAI-compatible API in response to {request.PATH}"
        repair = "check that `url` is the API's; see the server's log"
        if "log-probabilities" in str(error):
            raise UserError(
                Problem(_where(settings), actual, expected, "use a server that returns them, such as vLLM")
            ) from error
        return Failure(Problem(_where(settings), actual, expected, repair))
    return _check_filter(settings, answer, "")


def unknown_model_problem(settings: EndpointSettings, message: str, names: list[str]) -> Problem:
    """Return the problem of status 404.

    Args:
        settings: the endpoint.
        message: of the server.
        names: the models that the server lists, none if it lists none.
    """
    actual = f"status 404 for model '{settings.model}': {message}"
    expected = one_of(names) if names else "a model of this endpoint, and the base URL of its API"
    repair = did_you_mean(settings.model, names) or ("" if names else "correct `model`, or `url`")
    return Problem(_where(settings), actual, expected, repair)


def model_names(response: httpx2.Response) -> list[str]:
    """Return the models of a response to ``GET models``, [] if it has another form."""
    try:
        entries = response.json()["data"]
        return [str(entry["id"]) for entry in entries]
    except (ValueError, KeyError, TypeError):
        return []


def _read_error(
    settings: EndpointSettings, response: httpx2.Response, text: str, key: ApiKey
) -> EndpointAnswer | Failure:
    status = response.status_code
    message, code = _server_message(text)
    where, shown = _where(settings), message or response.reason_phrase
    if CONTENT_FILTER in code or "content_policy" in code:
        return _check_filter(settings, EndpointAnswer("", CONTENT_FILTER), shown)
    if status in (401, 403):
        actual, expected = f"status {status}: {shown}", "an API key that may use this model"
        raise UserError(Problem(where, actual, expected, key.repair(settings.api_key_env)))
    if status == RATE_LIMIT and code == NO_QUOTA:
        raise UserError(Problem(where, f"status {status}: {shown}", "an account with credit"))
    if status in PASSING_STATUSES:
        repair = "try later, or lower `concurrency`" if status == RATE_LIMIT else "see the server's log"
        problem = Problem(where, f"status {status}: {shown}", "an endpoint that answers", repair)
        return Failure(problem, _retry_after(response, problem), status == RATE_LIMIT)
    if 300 <= status < 400:
        actual = f"status {status}: a redirect to {response.headers.get('location', 'nowhere')}"
        raise UserError(Problem(where, actual, "the URL of the API itself", "correct `url`"))
    if settings.model in shown or "model" in code:
        raise UserError(
            Problem(where, f"status {status}: {shown}", "a model of this endpoint", "correct `model`")
        )
    repair = "change the request; `extra: {FIELD: null}` leaves out a field that the server refuses"
    raise UserError(Problem(where, f"status {status}: {shown}", "a request that the server accepts", repair))


def _check_filter(settings: EndpointSettings, answer: EndpointAnswer, message: str) -> EndpointAnswer:
    if answer.finish_reason != CONTENT_FILTER or settings.on_content_filter == "empty":
        return answer
    actual = "the provider's content filter refused a text" + (f": {message}" if message else "")
    repair = "set on_content_filter: empty, which counts it as an empty answer"
    raise UserError(Problem(_where(settings), actual, "prompts that the filter accepts", repair))


def _retry_after(response: httpx2.Response, problem: Problem) -> float | None:
    """Return the seconds of Retry-After (RFC 9110, section 10.2.3: seconds, or a date)."""
    text = response.headers.get("retry-after", "").strip()
    if not text:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", text):
        wait = float(text)
    else:
        try:
            wait = max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return None
    if wait > LONGEST_WAIT:
        actual = f"{problem.actual}; the server asks to wait for {wait:,.0f} s"
        raise UserError(Problem(problem.where, actual, f"at most {LONGEST_WAIT:.0f} s", "try again then"))
    return wait


def _server_message(text: str) -> tuple[str, str]:
    """Return message and code of an error response; the beginning of its text if it is not JSON."""
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split())[:MAX_SHOWN_CHARACTERS], ""
    message, code = error_of(content)
    return " ".join((message or text).split())[:MAX_SHOWN_CHARACTERS], code


def _where(settings: EndpointSettings) -> str:
    return f"endpoint {settings.url}"
