"""Settings of an OpenAI-compatible endpoint: from YAML, Python, or an option of the command line."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from finetune.recipe import yaml_file
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem, SettingError, UserError
from finetune.recipe.settings import (
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
URL_PATTERN = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?")
VARIABLE_PATTERN = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Capitals only: no provider's API key looks like that, so a key in place of a name is refused."""
OPTION_FORMAT = "FILE.yaml, or url=http://localhost:8000/v1,model=NAME"


class EndpointSettings(Section):
    """An OpenAI-compatible endpoint: address, model, requests, and budget."""

    # Values may be secrets in the wrong place.
    model_config = ConfigDict(hide_input_in_errors=True)
    NOT_IN_DIGEST: ClassVar[tuple[str, ...]] = (
        *("api_key_env", "concurrency", "timeout", "retries", "backoff", "cache"),
        *("budget_calls", "budget_tokens", "budget_price", "input_price", "output_price"),
    )

    url: NonEmptyStr = Field(description="base URL of the API, such as http://localhost:8000/v1")
    model: NonEmptyStr = Field(description="name of the model at the endpoint")
    api_key_env: NonEmptyStr = Field(
        DEFAULT_KEY_VARIABLE, description="NAME of the environment variable with the API key"
    )
    concurrency: Annotated[int, Field(ge=1, le=256)] = Field(8, description="requests in flight")
    # The openai package waits for 600 s, which hides a server that hangs.
    timeout: PositiveFloat = Field(300.0, description="seconds to wait for an answer")
    retries: NonNegativeInt = Field(
        6, description="further attempts after a failure that may pass: 429, 5xx, connection, timeout"
    )
    backoff: PositiveFloat = Field(
        1.0, description="seconds before the first retry; doubles each time up to 60, half of it random"
    )
    budget_calls: PositiveInt | None = Field(None, description="budget of a run: HTTP requests, with retries")
    budget_tokens: PositiveInt | None = Field(
        None, description="budget of a run: prompt and completion tokens"
    )
    budget_price: PositiveFloat | None = Field(
        None, description="budget of a run: price of the tokens, in the currency of the prices"
    )
    input_price: NonNegativeFloat | None = Field(None, description="price of 1,000,000 prompt tokens")
    output_price: NonNegativeFloat | None = Field(None, description="price of 1,000,000 completion tokens")
    cache: NonEmptyStr | None = Field(
        None, description="folder of the cached answers; null: the user's cache folder"
    )
    on_content_filter: Literal["error", "empty"] = Field(
        "error", description="a prompt that the provider's filter refuses: an error, or an empty answer"
    )
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens",
        description="request field of the maximum completion length; OpenAI's reasoning "
        "models take max_completion_tokens",
    )
    extra: dict[str, Any] = Field(
        {}, description="further request fields, such as {top_k: 20}; null removes a field: {seed: null}"
    )

    @field_validator("url", mode="after")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if not URL_PATTERN.fullmatch(url) or not _has_valid_port(url):
            # Not the URL itself: it may contain a password or a key.
            actual = "not the base URL of an API" if "@" not in url else "a URL with credentials"
            repair = "put the key into an environment variable, and its name into api_key_env"
            expected = "http:// or https://, host, port and path, without credentials, query and fragment"
            raise SettingError(actual, expected, repair if re.search("[@?]", url) else "")
        for ending in ("/chat/completions", "/completions"):
            if url.rstrip("/").endswith(ending):
                expected = "the base URL, which usually ends with /v1"
                raise SettingError(f"the URL ends with {ending}", expected, f"delete {ending}")
        return url.rstrip("/")

    @field_validator("api_key_env", mode="after")
    @classmethod
    def _check_variable(cls, name: str) -> str:
        if not VARIABLE_PATTERN.fullmatch(name):
            actual = "not a name in capitals (not shown, in case it is the key itself)"
            expected = f"the NAME of an environment variable, such as {DEFAULT_KEY_VARIABLE}"
            raise SettingError(actual, expected, "export MY_KEY=..., and set api_key_env: MY_KEY")
        return name

    @model_validator(mode="after")
    def _check_prices(self) -> Self:
        if self.budget_price is not None and self.input_price is None and self.output_price is None:
            expected = "input_price and output_price, per 1,000,000 tokens"
            raise SettingError("budget_price without prices", expected, "see the provider's price list")
        return self

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the price of some tokens, in the currency of the prices."""
        input_price, output_price = self.input_price or 0.0, self.output_price or 0.0
        return (prompt_tokens * input_price + completion_tokens * output_price) / 1e6


def _has_valid_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def read_endpoint(values: Mapping[str, Any], *, where: str = "endpoint") -> EndpointSettings:
    """Return the settings of a mapping, as YAML has it.

    Raises:
        UserError: unknown keys, values of the wrong type; all of them at once.
    """
    try:
        return EndpointSettings(**values)
    except ValidationError as error:
        # The cause is left out: pydantic's error object keeps the values, which may be secrets.
        raise UserError(validation_problems(where, error, model=EndpointSettings)) from None


def parse_endpoint(text: str, *, where: str = "--endpoint") -> EndpointSettings:
    """Return the settings of a command line option.

    Args:
        text: a YAML file, ``key=value,key=value``, or a YAML mapping in braces.
        where: the option, for messages.

    Raises:
        UserError: the text has another format, or settings have errors.
    """
    return read_endpoint(parse_option(text, where=where), where=where)


def parse_option(text: str, *, where: str) -> dict[str, Any]:
    """Return the settings of a command line option as a mapping; see ``parse_endpoint``.

    >>> parse_option("url=http://localhost:8000/v1,model=toy,concurrency=2", where="--endpoint")
    {'url': 'http://localhost:8000/v1', 'model': 'toy', 'concurrency': 2}
    """
    text = text.strip()
    if text.endswith((".yaml", ".yml")) and "=" not in text and not text.startswith("{"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise UserError(Problem(where, f"no such file: {text}", OPTION_FORMAT))
        return yaml_file.read_yaml(path)[0]
    if text.startswith("{"):
        value = yaml_file.parse_scalar(text)
        if not isinstance(value, dict):
            raise UserError(Problem(where, "not a YAML mapping", "{url: ..., model: ...}"))
        return value
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(key.strip() and equals for key, equals, _ in pairs):
        repair = "write values that contain commas into a file"
        raise UserError(Problem(where, "not key=value,key=value", OPTION_FORMAT, repair))
    return {key.strip(): yaml_file.parse_scalar(value) for key, _, value in pairs}
