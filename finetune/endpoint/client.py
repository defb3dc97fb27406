"""Client for OpenAI-compatible endpoints: many requests at a time, with retries, a cache and a budget."""

import asyncio
import contextlib
import json
import queue
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from platformdirs import user_cache_path

from finetune.answer_store import AnswerStore
from finetune.endpoint.messages import (
    ChatRequest,
    CompletionRequest,
    EndpointAnswer,
    EndpointRequest,
    from_json,
    request_key,
    to_json,
)
from finetune.endpoint.problems import (
    ApiKey,
    Failure,
    connection_failure,
    model_names,
    read_http_response,
    unknown_model_problem,
)
from finetune.endpoint.settings import EndpointSettings
from finetune.recipe.errors import Problem, UserError

LONGEST_BACKOFF = 60.0
FIRST_RETRIES = 1
"""Retries of the first connection: a wrong address is more likely than a server that restarts."""
CONNECT_SECONDS = 10.0
NOT_FOUND = 404
Progress = Callable[[int, int], None]
"""Receives the number of answers so far, those of the cache included, and of all requests."""
T = TypeVar("T")
FILE = "endpoint-answers.sqlite"
REPAIR = "delete the file (its answers are requested again), or set another `cache`"


@dataclass
class EndpointUsage:
    """What the requests of a client have used.

    Attributes:
        calls: HTTP requests, with retries.
        retries: those among them that repeated a failed one.
        cached: answers from the cache.
        prompt_tokens: as the server counts them.
        completion_tokens: as above.
    """

    calls: int = 0
    retries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class BudgetError(UserError):
    """The budget of an endpoint is used up; all answers so far are in the cache."""


class EndpointClient:
    """Sends requests to one model of an endpoint; its methods may be called from a notebook too."""

    def __init__(self, settings: EndpointSettings) -> None:
        """Open the cache and read the API key.

        Raises:
            UserError: the key's variable is not set, or the cache cannot be used.
        """
        self.settings = settings
        self.usage = EndpointUsage()
        self._key = ApiKey(settings)
        self._cache = _open_cache(Path(settings.cache).expanduser() if settings.cache else None)
        self._connected = False
        self._resume_at = 0.0

    @property
    def identity(self) -> dict[str, Any]:
        """Return what decides the answers besides the request."""
        return {"url": self.settings.url, "model": self.settings.model, "extra": self.settings.extra}

    @property
    def price(self) -> float:
        """Return the price of the tokens used, in the currency of the prices."""
        return self.settings.price(self.usage.prompt_tokens, self.usage.completion_tokens)

    def record(self) -> dict[str, Any]:
        """Return model and usage for run records."""
        return {
            "url": self.settings.url,
            "model": self.settings.model,
            **asdict(self.usage),
            "price": self.price,
        }

    def chat_many(
        self, requests: Sequence[ChatRequest], *, progress: Progress | None = None
    ) -> list[EndpointAnswer]:
        """Return the replies to conversations, in the order of the requests.

        Raises:
            UserError: endpoint, key, model, request or budget; the answers so far are in the cache.
        """
        return self._ask(requests, progress)

    def complete_many(
        self, requests: Sequence[CompletionRequest], *, progress: Progress | None = None
    ) -> list[EndpointAnswer]:
        """Return the completions of texts, in the order of the requests; see ``chat_many``."""
        return self._ask(requests, progress)

    def _ask(self, requests: Sequence[EndpointRequest], progress: Progress | None) -> list[EndpointAnswer]:
        keys = [self._request_key(request) for request in requests]
        # Equal requests are asked once.
        by_key = dict(zip(reversed(keys), reversed(requests), strict=True))
        answers = {key: from_json(values) for key, values in self._cache.load(list(by_key)).items()}
        self.usage.cached += len(answers)
        batch = _Batch(
            answers, deque((key, by_key[key]) for key in dict.fromkeys(keys) if key not in answers), progress
        )
        if batch.missing:
            _run_async(self._ask_missing(batch))
        return [answers[key] for key in keys]

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        # The certificates take 0.2 s to read: once, and not for http.
        if self.settings.url.startswith("https:"):
            return httpx2.create_ssl_context()
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def _request_key(self, request: EndpointRequest) -> str:
        return request_key(self.settings.url, request.PATH, request.body(self.settings), request.seed)

    async def _ask_missing(self, batch: "_Batch") -> None:
        settings = self.settings
        num_workers = min(settings.concurrency, len(batch.missing))
        timeout = httpx2.Timeout(settings.timeout, connect=min(CONNECT_SECONDS, settings.timeout))
        limits = httpx2.Limits(max_connections=num_workers, max_keepalive_connections=num_workers)
        async with httpx2.AsyncClient(
            base_url=f"{settings.url}/",
            verify=self._ssl_context,
            headers={"Content-Type": "application/json", **self._key.headers},
            timeout=timeout,
            limits=limits,
        ) as http:
            writer = asyncio.create_task(self._store_answers(batch))
            try:
                await asyncio.gather(*(self._work(http, batch) for _ in range(num_workers)))
            finally:  # also after Ctrl-C
                batch.answered.put_nowait(None)
                await writer
        if batch.error is not None:
            raise _with_progress(batch.error, len(batch.answers), batch.total)

    async def _work(self, http: httpx2.AsyncClient, batch: "_Batch") -> None:
        """Answer requests until none is left, or one has failed."""
        while batch.missing and batch.error is None:
            key, request = batch.missing.popleft()
            try:
                await self._wait_for_limit(batch)
                answer = await self._answer(http, request, batch)
                if answer is not None:
                    batch.answered.put_nowait((key, answer))
                    self._check_usage(answer)
            except UserError as error:
                # The first error is reported; the requests in flight are answered and stored.
                batch.fail(error)

    async def _store_answers(self, batch: "_Batch") -> None:
        """Store answers until None comes; those that arrive during a write are written together."""
        is_open = True
        while is_open:
            arrived = [await batch.answered.get()]
            while not batch.answered.empty():
                arrived.append(batch.answered.get_nowait())
            is_open = None not in arrived
            answers = dict(item for item in arrived if item is not None)
            try:
                # In a thread: a write takes 1 to 50 ms, in which responses are read.
                await asyncio.to_thread(
                    self._cache.store, {key: to_json(answer) for key, answer in answers.items()}
                )
            except UserError as error:
                batch.fail(error)
                return
            batch.add(answers)

    async def _answer(
        self, http: httpx2.AsyncClient, request: EndpointRequest, batch: "_Batch"
    ) -> EndpointAnswer | None:
        """Return the answer to a request; None if another request has failed for good meanwhile.

        Raises:
            UserError: the request failed for good, or the budget is used up.
        """
        body = json.dumps(request.body(self.settings)).encode()
        attempt = num_sent = 0
        num_answers = len(batch.answers)
        while batch.error is None:
            self._take_call(is_retry=num_sent > 0)
            num_sent += 1
            try:
                response = await http.post(request.PATH, content=body)
            except httpx2.RequestError as error:
                outcome: EndpointAnswer | Failure = connection_failure(self.settings, error)
            else:
                self._connected = True
                if response.status_code == NOT_FOUND:
                    raise UserError(await self._not_found(http, response))
                outcome = read_http_response(self.settings, request, response, self._key)
            if isinstance(outcome, EndpointAnswer):
                return outcome
            # Under a rate limit, a request may lose many times to the others before its turn comes.
            if outcome.rate_limited and len(batch.answers) > num_answers:
                attempt = 0
            num_answers = len(batch.answers)
            retries = self.settings.retries if self._connected else min(FIRST_RETRIES, self.settings.retries)
            if attempt >= retries:
                raise UserError(_after_attempts(outcome.problem, num_sent))
            await batch.sleep(self._wait_seconds(outcome, attempt))
            await self._wait_for_limit(batch)
            attempt += 1
        return None

    def _wait_seconds(self, failure: Failure, attempt: int) -> float:
        """Return the wait before the next attempt: what the server asks, else exponentially longer."""
        # Partly random, so that requests that failed together do not come back together.
        # "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: equal jitter.
        backoff = min(LONGEST_BACKOFF, self.settings.backoff * 2.0**attempt) * random.uniform(0.5, 1.0)
        if failure.wait is not None:
            backoff = failure.wait + self.settings.backoff * random.random()
        if failure.rate_limited:
            self._resume_at = max(self._resume_at, time.monotonic() + (failure.wait or 0.0))
        return backoff

    async def _wait_for_limit(self, batch: "_Batch") -> None:
        """Wait for the end of a rate limit, which concerns all requests and not only the one that met it."""
        while batch.error is None and (rest := self._resume_at - time.monotonic()) > 0:
            await batch.sleep(rest)

    async def _not_found(self, http: httpx2.AsyncClient, response: httpx2.Response) -> Problem:
        try:
            names = model_names(await http.get("models"))
        except httpx2.RequestError:
            names = []
        message = " ".join(self._key.redact(response.text).split())[:200]
        return unknown_model_problem(self.settings, message, names)

    def _take_call(self, *, is_retry: bool) -> None:
        """Count a request.

        Raises:
            BudgetError: one of the limits is reached.
        """
        settings, usage = self.settings, self.usage
        tokens = usage.prompt_tokens + usage.completion_tokens
        spent = [
            ("budget_calls", usage.calls, settings.budget_calls),
            ("budget_tokens", tokens, settings.budget_tokens),
            ("budget_price", self.price, settings.budget_price),
        ]
        for name, used, limit in spent:
            if limit is not None and used >= limit:
                actual = f"the budget is used up: {used:,.6g} of {limit:,.6g}"
                raise BudgetError(
                    Problem(
                        name,
                        actual,
                        "budget for the remaining requests",
                        f"raise {name}, and repeat the command",
                    )
                )
        usage.calls += 1
        usage.retries += is_retry

    def _check_usage(self, answer: EndpointAnswer) -> None:
        """Count the tokens of an answer.

        Raises:
            UserError: the server does not count tokens, and the budget has a limit of them.
        """
        counts = (answer.prompt_tokens, answer.completion_tokens)
        if None in counts and (self.settings.budget_tokens or self.settings.budget_price):
            name = "budget_tokens" if self.settings.budget_tokens else "budget_price"
            actual = "the endpoint does not report how many tokens it has used"
            raise UserError(Problem(name, actual, "a `usage` in each answer", "set budget_calls instead"))
        self.usage.prompt_tokens += counts[0] or 0
        self.usage.completion_tokens += counts[1] or 0


class _Batch:
    """The requests of one call: stored answers, requests without one, answers to store, the first error."""

    def __init__(
        self,
        answers: dict[str, EndpointAnswer],
        missing: deque[tuple[str, EndpointRequest]],
        progress: Progress | None,
    ) -> None:
        self.answers, self.missing, self.progress = answers, missing, progress
        self.total = len(answers) + len(missing)
        self.error: UserError | None = None
        self.answered: asyncio.Queue[tuple[str, EndpointAnswer] | None] = asyncio.Queue()
        self._failed = asyncio.Event()

    def fail(self, error: UserError) -> None:
        """Stop; the first error is reported."""
        self.error = self.error or error
        self._failed.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, at most until a request fails."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._failed.wait(), seconds)

    def add(self, answers: Mapping[str, EndpointAnswer]) -> None:
        self.answers.update(answers)
        if self.progress is not None:
            self.progress(len(self.answers), self.total)


def _after_attempts(problem: Problem, attempts: int) -> Problem:
    return replace(problem, actual=f"{problem.actual} ({attempts} attempts)") if attempts > 1 else problem


def _with_progress(error: UserError, done: int, total: int) -> UserError:
    """Return an error that says how many answers are cached."""
    note = f"{done:,} of {total:,} answers are in the cache"
    problems = [
        replace(problem, repair="; ".join(filter(None, (problem.repair, note)))) for problem in error.problems
    ]
    return type(error)(problems)


def _run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine, which runs in a thread of its own.

    A notebook's thread has an event loop already, and none can run inside it.
    """
    started: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = queue.Queue()

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        started.put((asyncio.get_running_loop(), task))
        return await coroutine

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(lambda: asyncio.run(main()))
        try:
            return future.result()
        except KeyboardInterrupt:
            # The requests in flight end at once, and not after their timeout.
            loop, task = started.get()
            if not future.done():
                loop.call_soon_threadsafe(task.cancel)
            raise


def _open_cache(folder: Path | None) -> AnswerStore:
    """Open or create the file with the answers of all endpoints.

    Args:
        folder: where it is; None: in the user's cache folder.

    Raises:
        UserError: the folder cannot be written, or the file is damaged.
    """
    return AnswerStore((folder or user_cache_path("llm-align")) / FILE, repair=REPAIR)
