"""JSON schema of a stage's recipe for editors, rows for ``show``, and recipes for ``list``."""

from functools import reduce
from operator import or_
from typing import Any, Literal

from pydantic import Field, create_model

from finetune.recipe import yaml_file
from finetune.recipe.discovery import (
    ADAPTERS,
    adapter_settings,
    plugin_names,
    recipe_names,
)
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe, stage_settings
from finetune.recipe.settings import AdapterSettings


def recipe_schema(stage: str) -> dict[str, Any]:
    """Return the JSON schema of a stage's recipe; the adapter's keys depend on ``method``.

    Raises:
        UserError: there is no such stage.
    """
    adapters = [adapter_settings(name) for name in plugin_names(ADAPTERS)]
    # A union of all adapters, discriminated by `method`: editors complete the keys of the chosen one.
    any_adapter: Any = reduce(or_, adapters)
    fields: dict[str, Any] = {
        "stage": (Literal[stage], stage),
        "description": (str, Field("", description="one line for `llm-align list`")),
        "adapter": (any_adapter, Field(AdapterSettings(), discriminator="method")),
    }
    model = create_model(f"{stage}-recipe", __base__=stage_settings(stage), **fields)
    content = model.model_json_schema()
    _require_method(content["$defs"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **content}


def setting_rows(recipe: Recipe) -> list[tuple[str, Any, str]]:
    """Return ``(section.key, value, origin)`` for every setting, in the order of the sections."""
    values = recipe.values().items()
    keys = [(f"{section}.{key}", value) for section, content in values for key, value in content.items()]
    return [(key, value, recipe.origins[key]) for key, value in keys]


def _require_method(definitions: dict[str, Any]) -> None:
    """Make ``method`` required for all adapters but the default one, so that exactly one schema matches."""
    for definition in definitions.values():
        method = definition.get("properties", {}).get("method", {}).get("const")
        if method not in (None, AdapterSettings().method):
            definition["required"] = ["method", *definition.get("required", [])]


def recipe_descriptions(stage: str) -> dict[str, str]:
    """Return each recipe's description, or its error if the file cannot be read."""
    descriptions = {}
    for name, path in recipe_names(stage).items():
        try:
            descriptions[name] = str(yaml_file.read_yaml(path)[0].get("description") or "")
        except UserError as error:
            descriptions[name] = f"cannot be read: {error.problems[0].actual}"
    return descriptions
