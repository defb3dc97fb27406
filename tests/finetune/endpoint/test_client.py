"""The client against a local server: answers, retries, cache, budget, keys, one message for each error."""

import asyncio
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from servers import FakeEndpoint, Fault, prompt_of, token_logprob, tokens

from data_templates.segments import Message
from finetune.endpoint.client import BudgetError, EndpointClient
from finetune.endpoint.messages import ChatRequest, CompletionRequest
from finetune.endpoint.settings import EndpointSettings
from finetune.recipe.errors import UserError

KEY = "sk-secret-0123456789abcdef"


def client(server: FakeEndpoint | str, cache: Path, **settings: Any) -> EndpointClient:
    url = server if isinstance(server, str) else server.url
    values = {"backoff": 0.001, "retries": 2, "cache": str(cache), "model": "toy", **settings}
    return EndpointClient(EndpointSettings(url=url, **values))


def chats(*texts: str, **sampling: Any) -> list[ChatRequest]:
    return [ChatRequest([Message("user", text)], **sampling) for text in texts]


def error_of(call: Any, *requests: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*requests)
    [problem] = caught.value.problems
    return str(problem)


def test_answers_come_in_the_order_of_the_requests_and_once(tmp_path: Path) -> None:
    texts = [f"question {number}" for number in range(20)]
    with FakeEndpoint(delay=0.005) as server:
        first = client(server, tmp_path, concurrency=4)
        answers = first.chat_many(chats(*texts, "question 3"))
        assert [answer.text for answer in answers] == [f"echo {text}" for text in [*texts, "question 3"]]
        assert len(server.received) == 20 and 1 < server.most_in_flight <= 4
        assert first.record() | {"url": ""} == {
            **{"url": "", "model": "toy", "calls": 20, "retries": 0, "cached": 0},
            **{"prompt_tokens": 40, "completion_tokens": 60, "price": 0.0},
        }
        again = client(server, tmp_path, concurrency=1, timeout=3.0)
        assert [answer.text for answer in again.chat_many(chats(*texts))] == [
            f"echo {text}" for text in texts
        ]
        assert len(server.received) == 20
        assert again.usage.cached == 20 and again.usage.calls == 0
        assert again.chat_many(chats("question 3"))[0].cached


def test_a_request_has_the_fields_of_the_api(tmp_path: Path) -> None:
    turns = [
        Message("system", "Be brief."),
        Message("user", "Add.", context="2 3"),
        Message("assistant", "5"),
    ]
    request = ChatRequest([*turns, Message("user", "again")], max_tokens=7, stop=["\n"], top_p=0.5, seed=3)
    with FakeEndpoint() as server:
        extra = {"top_k": 20, "seed": None}
        client(server, tmp_path, extra=extra, token_limit_field="max_completion_tokens").chat_many([request])
        [received] = server.received
    assert received.path == "/v1/chat/completions"
    assert received.body == {
        "model": "toy",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add.\n\n2 3"},
            {"role": "assistant", "content": "5"},
            {"role": "user", "content": "again"},
        ],
        **{"max_completion_tokens": 7, "temperature": 0.0, "top_p": 0.5, "stop": ["\n"], "top_k": 20},
    }


def test_what_decides_an_answer_is_in_its_key(tmp_path: Path) -> None:
    with FakeEndpoint(models=("toy", "other")) as server:
        cached = client(server, tmp_path)
        cached.chat_many(chats("a"))
        for sampling in (
            {"temperature": 1.0},
            {"seed": 1},
            {"top_p": 0.5},
            {"max_tokens": 3},
            {"stop": ["x"]},
        ):
            before = len(server.received)
            cached.chat_many(chats("a", **sampling))
            assert len(server.received) == before + 1, sampling
        client(server, tmp_path, model="other").chat_many(chats("a"))
        client(server, tmp_path, extra={"top_k": 1}).chat_many(chats("a"))
        # The server takes no seed: two samples are two requests nevertheless.
        client(server, tmp_path, extra={"seed": None}).chat_many([*chats("a", seed=1), *chats("a", seed=2)])
        cached.complete_many([CompletionRequest("a")])
        assert len(server.received) == 11


def test_log_probabilities_of_completions_and_chats(tmp_path: Path) -> None:
    with FakeEndpoint(reply=lambda body: " Paris now") as server:
        asked = client(server, tmp_path)
        prompt = "The capital is"
        [scored] = asked.complete_many([CompletionRequest(prompt, max_tokens=0, echo=True, top_logprobs=0)])
        assert scored.text == prompt
        assert [token.logprob for token in scored.logprobs] == [None, token_logprob(" capital"), -3 / 8]
        assert [token.offset for token in scored.logprobs] == [0, 3, 11]
        [continued] = asked.complete_many([CompletionRequest(prompt, top_logprobs=0)])
        assert [(token.token, token.logprob) for token in continued.logprobs] == [
            (" Paris", -0.75),
            (" now", -0.5),
        ]
        [chat] = asked.chat_many(chats("Where?", top_logprobs=1))
        assert [dict(token.top) for token in chat.logprobs] == [{" Paris": -0.75}, {" now": -0.5}]
        [from_cache] = asked.chat_many(chats("Where?", top_logprobs=1))
        assert from_cache.logprobs == chat.logprobs


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(status=status) for status in (429, 500, 503)),
        *(Fault(kind) for kind in ("broken_json", "cut", "drop", "no_choices", "html")),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_failures_that_may_pass_are_retried(fault: Fault, tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        asked = client(server, tmp_path)
        asked.chat_many(chats("first"))
        server.fail(fault, times=2)
        assert asked.chat_many(chats("a"))[0].text == "echo a"
        assert (asked.usage.calls, asked.usage.retries) == (4, 2)
        server.fail(fault, times=3)
        message = error_of(asked.chat_many, chats("b"))
        assert "(3 attempts)" in message and "0 of 1 answers are in the cache" in message


def test_a_rate_limit_holds_for_all_requests(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        asked = client(server, tmp_path, concurrency=4)
        asked.chat_many(chats("first"))
        server.fail(Fault(status=429, retry_after="0.1"), times=4)
        answers = asked.chat_many(chats(*"abcdefgh"))
        assert [answer.text for answer in answers] == [f"echo {text}" for text in "abcdefgh"]
        refused, later = server.received[1:5], server.received[5:]
        assert len(later) == 8
        assert min(request.time for request in later) >= max(request.time for request in refused) + 0.1


def test_requests_wait_for_their_turn_under_a_rate_limit(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        server.interval = 0.1
        # The last of the six is refused about five times, more often than it may fail.
        answers = client(server, tmp_path, concurrency=6, retries=2).chat_many(chats(*"abcdef"))
        assert [answer.text for answer in answers] == [f"echo {text}" for text in "abcdef"]


CASES: dict[str, tuple[Fault | None, dict[str, Any], tuple[str, ...]]] = {
    "unknown model": (None, {"model": "tpy"}, ("status 404 for model 'tpy'", "did you mean 'toy'?")),
    "bad request": (
        Fault(status=400, message="too long"),
        {},
        ("status 400: too long", "extra: {FIELD: null}"),
    ),
    "no JSON": (Fault("broken_json"), {"retries": 0}, ("an answer that cannot be used: not JSON",)),
    "no choices": (Fault("no_choices"), {"retries": 0}, ("an answer that cannot be used: no choices",)),
    "no credit": (Fault(status=429, code="insufficient_quota"), {}, ("an account with credit",)),
    "long wait": (Fault(status=429, retry_after="7200"), {}, ("asks to wait for 7,200 s", "at most 300 s")),
    "filter": (
        Fault(status=400, code="content_filter", message="no!"),
        {},
        ("content filter", "no!", "empty"),
    ),
    "redirect": (Fault(status=307), {}, ("status 307: a redirect", "correct `url`")),
    "no usage": (Fault("no_usage"), {"budget_tokens": 9}, ("budget_tokens:", "set budget_calls instead")),
}


@pytest.mark.parametrize(("fault", "settings", "parts"), CASES.values(), ids=CASES)
def test_an_error_is_one_message(
    fault: Fault | None, settings: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    with FakeEndpoint() as server:
        if fault is not None:
            server.fail(fault)
        message = error_of(client(server, tmp_path, **settings).chat_many, chats("a"))
        assert all(part in message for part in parts), message
        assert len(server.received) == 1
        assert len(message.splitlines()) == 3


def test_an_endpoint_that_is_down(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    down = client(url, tmp_path, retries=6)
    message = error_of(down.chat_many, chats("a"))
    assert f"endpoint {url}: no connection" in message and "start the server, or correct `url`" in message
    assert down.usage.calls == 2, "a first connection is retried once"


def test_a_slow_endpoint_times_out(tmp_path: Path) -> None:
    with FakeEndpoint(delay=0.5) as server:
        message = error_of(client(server, tmp_path, timeout=0.05, retries=0).chat_many, chats("a"))
        assert "no answer within 0.05 s" in message


def test_filtered_texts_may_count_as_empty(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        asked = client(server, tmp_path, on_content_filter="empty")
        server.fail(Fault(status=400, code="content_filter"))
        [answer] = asked.chat_many(chats("harmful"))
        assert (answer.text, answer.finish_reason) == ("", "content_filter")
        server.finish_reason = "content_filter"
        assert asked.chat_many(chats("other"))[0].finish_reason == "content_filter"
        assert "on_content_filter" in error_of(client(server, tmp_path / "new").chat_many, chats("other"))


def test_the_budget_ends_a_run_and_the_answers_are_kept(tmp_path: Path) -> None:
    questions = chats(*"abcde")
    with FakeEndpoint() as server:
        message = error_of(client(server, tmp_path, budget_calls=3, concurrency=1).chat_many, questions)
        assert message.splitlines() == [
            "budget_calls: the budget is used up: 3 of 3",
            "    expected: budget for the remaining requests",
            "    repair:   raise budget_calls, and repeat the command; 3 of 5 answers are in the cache",
        ]
        # Each chat has 1 token in the prompt and 2 in the reply.
        limited = client(server, tmp_path, budget_tokens=3, concurrency=1)
        with pytest.raises(BudgetError, match="used up: 3 of 3"):
            limited.chat_many(questions)
        assert len(server.received) == 4
        priced = client(server, tmp_path, budget_price=5e-6, input_price=1.0, output_price=2.0, concurrency=1)
        assert len(priced.chat_many(questions)) == 5 and priced.price == 5e-6
        assert "budget_price: the budget is used up" in error_of(priced.chat_many, chats("f"))
        assert len(server.received) == 5


def test_the_key_is_sent_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    with FakeEndpoint(reply=lambda body: f"your key is {KEY}", api_key=KEY) as server:
        asked = client(server, tmp_path, api_key_env="MY_KEY")
        [answer] = asked.chat_many(chats("a"))
        assert answer.text == "your key is ***"
        assert server.received[0].headers["authorization"] == f"Bearer {KEY}"
        server.api_key = "another"
        message = error_of(asked.chat_many, chats("b"))
    assert "status 401: wrong key: Bearer ***" in message and "check the value of MY_KEY" in message
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"your key is" in written and KEY.encode() not in written
    assert KEY not in caplog.text + repr(asked.settings) + str(asked.record()) + str(vars(asked._key).keys())


def test_a_missing_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeEndpoint(api_key=KEY) as server:
        message = error_of(client(server, tmp_path).chat_many, chats("a"))
        assert "status 401" in message and "export OPENAI_API_KEY=..." in message
        with pytest.raises(UserError, match="the environment variable MY_KEY is not set"):
            client(server, tmp_path, api_key_env="MY_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert client("http://models.example.com/v1", tmp_path)._key.headers == {}
    assert client("https://models.example.com/v1", tmp_path)._key.headers == {
        "Authorization": f"Bearer {KEY}"
    }


def test_it_works_inside_an_event_loop(tmp_path: Path) -> None:
    async def cell() -> str:
        return client(server, tmp_path).chat_many(chats("a"))[0].text

    with FakeEndpoint() as server:
        assert asyncio.run(cell()) == "echo a"


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "endpoint-answers.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="cannot be used: file is not a database"):
        client("http://localhost:1/v1", tmp_path)


PROGRAM = """
import sys
from data_templates.segments import Message
from finetune.endpoint.client import EndpointClient
from finetune.endpoint.messages import ChatRequest
from finetune.endpoint.settings import EndpointSettings
assert "torch" not in sys.modules and "transformers" not in sys.modules
settings = EndpointSettings(url=sys.argv[1], model="toy", cache=sys.argv[2], concurrency=2)
requests = [ChatRequest([Message("user", str(number))]) for number in range(24)]
print([answer.text for answer in EndpointClient(settings).chat_many(requests)])
"""


def start(server: FakeEndpoint, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, server.url, str(cache)]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def num_stored(cache: Path) -> int:
    file = cache / "endpoint-answers.sqlite"
    if not file.exists():
        return 0
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        try:
            [[count]] = connection.execute("SELECT count(*) FROM answers")
        except sqlite3.OperationalError:  # the table is not made yet
            return 0
    return int(count)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_loses_no_answer(how: signal.Signals, tmp_path: Path) -> None:
    slow = {"18"}
    with FakeEndpoint(
        reply=lambda body: (time.sleep(20 * (prompt_of(body) in slow)), prompt_of(body))[1]
    ) as server:
        process = start(server, tmp_path)
        while num_stored(tmp_path) < 23:  # one worker waits for 18, the other has done the rest
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(how)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == -how and ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
        slow.clear()
        answered = len(server.received)
        everything = [str(number) for number in range(24)]
        if how == signal.SIGKILL:
            both = [start(server, tmp_path), start(server, tmp_path)]
            assert [process.communicate()[0] for process in both] == [f"{everything}\n"] * 2
        else:
            answers = client(server, tmp_path).chat_many(
                [ChatRequest([Message("user", text)]) for text in everything]
            )
            assert [answer.text for answer in answers] == everything
        assert {prompt_of(body) for body in server.bodies[answered:]} == {"18"}


def test_the_server_splits_texts_into_its_tokens() -> None:
    assert tokens("The capital\n is ") == ["The", " capital", "\n is", " "]
