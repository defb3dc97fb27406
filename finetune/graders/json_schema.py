"""JSON schema: the completion is JSON that a schema accepts.

One Markdown code fence around the JSON is allowed, and no other text. The schema is an option, else the
column ``schema`` of the row (an object, or JSON text); without one the completion has to be JSON.
"""

import json
import re
from typing import Any

from pydantic import Field, field_validator

from finetune.recipe.settings import Section

PACKAGES = ("jsonschema",)
FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL | re.IGNORECASE)


class Options(Section):
    """Options of the validation."""

    json_schema: dict[str, Any] | None = Field(
        None, description="JSON schema, by default of draft 2020-12; null: the row's `schema`"
    )
    fence: bool = Field(True, description="true: a Markdown code fence around the JSON is allowed")

    @field_validator("json_schema")
    @classmethod
    def _is_valid(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            _checked(schema)
        return schema


DEFAULTS = Options()


def json_schema(completion: str, schema: Any = None, *, options: Options = DEFAULTS) -> bool:
    """Return whether the completion is JSON, and valid under the schema.

    >>> json_schema('{"age": 3}', {"required": ["age"]}), json_schema('{"age": 3}', {"required": ["name"]})
    (True, False)

    Raises:
        ValueError: the row's schema is not valid.
    """
    text = completion.strip()
    if options.fence and (match := FENCE.fullmatch(text)):
        text = match[1]
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return False
    rules = options.json_schema
    if rules is None and schema is not None:
        rules = json.loads(schema) if isinstance(schema, str) else schema
    return rules is None or _checked(rules).is_valid(value)


def _no_constant(text: str) -> Any:
    # Python's parser accepts NaN and Infinity, which JSON does not have (RFC 8259, section 6).
    raise ValueError(text)


def _checked(schema: Any) -> Any:
    """Return the validator of a schema.

    Raises:
        ValueError: the schema is not valid.
    """
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"no JSON schema: {error.message}") from error
    return kind(schema)
