"""A local server with OpenAI's API for tests: chat completions, completions, models; it can fail on request.

    with FakeEndpoint(reply=lambda body: "Paris") as server:
        server.fail(Fault(status=429, retry_after="0"), times=2)
        ...                                     # requests to server.url
        assert server.bodies[-1]["model"] == "toy"

It answers with ``reply(body)``. Tokens are words with the space before them, and each has the log-probability
``token_logprob(token)``.
"""

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

Kind = Literal["status", "broken_json", "cut", "drop", "no_choices", "no_usage", "html"]


@dataclass(frozen=True)
class Fault:
    """What the server does in place of an answer.

    ``status``: an error of that status; ``broken_json``: the first half of the JSON; ``cut``: fewer bytes
    than announced; ``drop``: the connection is closed without an answer; ``no_choices``: an empty list;
    ``no_usage``: no counts of tokens; ``html``: a page with status 200.
    """

    kind: Kind = "status"
    status: int = 500
    retry_after: str | None = None
    message: str = "a failure on request"
    code: str = ""


@dataclass(frozen=True)
class Received:
    """A request that the server received."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float = field(default_factory=time.monotonic)


def prompt_of(body: dict[str, Any]) -> str:
    """Return the last user turn, or the text to complete."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


def tokens(text: str) -> list[str]:
    """Split a text into words with the whitespace before them."""
    return re.findall(r"\s*\S+|\s+$", text)


def token_logprob(token: str) -> float:
    """Return a log-probability that tests can compute."""
    return -len(token) / 8


class FakeEndpoint:
    """A server on a free port of this machine.

    Attributes:
        reply: the text of an answer, from the request's body.
        models: names that it accepts; others are status 404.
        api_key: the key that it demands; None: it takes any, or none.
        delay: seconds before each answer.
        interval: seconds between answers at least; requests in between get status 429 with Retry-After.
        finish_reason: of each answer.
        received: the requests so far.
        most_in_flight: the largest number of requests at the same time.
    """

    def __init__(
        self,
        reply: Callable[[dict[str, Any]], str] = lambda body: f"echo {prompt_of(body)}",
        *,
        models: tuple[str, ...] = ("toy",),
        api_key: str | None = None,
        delay: float = 0.0,
    ) -> None:
        self.reply, self.models, self.api_key, self.delay = reply, models, api_key, delay
        self.finish_reason, self.interval = "stop", 0.0
        self.received: list[Received] = []
        self.most_in_flight = 0
        self._faults: deque[Fault | None] = deque()
        self._in_flight, self._next_answer = 0, 0.0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Return the bodies of the requests so far."""
        return [request.body for request in self.received]

    def fail(self, fault: Fault | None, times: int = 1) -> None:
        """Let the next requests fail; None lets them succeed."""
        self._faults.extend([fault] * times)

    def answer(self, request: Received) -> tuple[int, dict[str, str], bytes, int]:
        """Return status, headers, body and the length that the server announces, for a POST."""
        with self._lock:
            self.received.append(request)
            fault = self._faults.popleft() if self._faults else None
            rest = self._next_answer - time.monotonic()
            if fault is None and rest > 0:
                fault = Fault(status=429, retry_after=f"{rest:.3f}")
            elif fault is None:
                self._next_answer = time.monotonic() + self.interval
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            # Some servers repeat the key.
            message = f"wrong key: {request.headers.get('authorization', 'none')}"
            return _error(Fault(status=401, message=message, code="invalid_api_key"))
        if request.body.get("model") not in self.models:
            return _error(Fault(status=404, message="no such model", code="model_not_found"))
        if fault is not None and fault.kind == "status":
            return _error(fault)
        if fault is not None and fault.kind == "html":
            return _plain(200, b"<html>a proxy's page</html>")
        content = self._content(request)
        if fault is not None and fault.kind == "no_choices":
            content["choices"] = []
        if fault is not None and fault.kind == "no_usage":
            del content["usage"]
        data = json.dumps(content).encode()
        if fault is not None and fault.kind == "drop":
            return 0, {}, b"", 0
        if fault is not None and fault.kind in ("broken_json", "cut"):
            half = data[: len(data) // 2]
            return 200, {}, half, len(data) if fault.kind == "cut" else len(half)
        return _plain(200, data)

    def _content(self, request: Received) -> dict[str, Any]:
        body = request.body
        text = self.reply(body)
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish_reason}
        if request.path.endswith("/chat/completions"):
            choice["message"] = {"role": "assistant", "content": text}
            prompt = " ".join(turn["content"] for turn in body["messages"])
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [_chat_token(token, body) for token in tokens(text)]}
        else:
            prompt = body["prompt"]
            text = text if body.get("max_tokens") else ""
            choice["text"] = prompt + text if body.get("echo") else text
            if body.get("logprobs") is not None:
                choice["logprobs"] = _text_tokens(choice["text"], body)
        counts = {"prompt_tokens": len(tokens(prompt)), "completion_tokens": len(tokens(text))}
        return {"object": "completion", "model": body["model"], "choices": [choice], "usage": counts}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are two writes: 40 ms otherwise

            def log_message(self, format: str, *values: object) -> None:
                """Print nothing."""

            def do_GET(self) -> None:
                models = {"object": "list", "data": [{"id": name} for name in server.models]}
                self._send(*_plain(200, json.dumps(models).encode()))

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                with server._lock:
                    server._in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server._in_flight)
                try:
                    time.sleep(server.delay)
                    response = server.answer(Received(self.path, headers, json.loads(text)))
                finally:
                    with server._lock:
                        server._in_flight -= 1
                self._send(*response)

            def _send(self, status: int, headers: dict[str, str], data: bytes, length: int) -> None:
                if status:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(length))
                    self.end_headers()
                    self.wfile.write(data)
                self.close_connection = not status or length != len(data)

        return Handler


def _plain(status: int, data: bytes) -> tuple[int, dict[str, str], bytes, int]:
    return status, {}, data, len(data)


def _error(fault: Fault) -> tuple[int, dict[str, str], bytes, int]:
    data = json.dumps({"error": {"message": fault.message, "code": fault.code or None}}).encode()
    headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
    return fault.status, headers, data, len(data)


def _chat_token(token: str, body: dict[str, Any]) -> dict[str, Any]:
    top = [{"token": token, "logprob": token_logprob(token)}][: body.get("top_logprobs", 0)]
    return {"token": token, "logprob": token_logprob(token), "top_logprobs": top}


def _text_tokens(text: str, body: dict[str, Any]) -> dict[str, Any]:
    words = tokens(text)
    offsets = [sum(map(len, words[:number])) for number in range(len(words))]
    logprobs: list[float | None] = [token_logprob(token) for token in words]
    if body.get("echo") and logprobs:
        logprobs[0] = None
    return {"tokens": words, "token_logprobs": logprobs, "text_offset": offsets, "top_logprobs": None}
