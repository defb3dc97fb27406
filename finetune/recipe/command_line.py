"""Command-line overrides of a recipe: parse ``section.key=value``, apply, drop obsolete values."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.recipe import yaml_file
from finetune.recipe.discovery import ADAPTERS, load_plugin, plugin_names
from finetune.recipe.errors import Problem, nearest, one_of
from finetune.recipe.settings import AdapterSettings, StageSettings

Values = dict[str, dict[str, Any]]
"""A recipe's sections before validation: ``{section: {key: value}}``."""

Origins = dict[str, str]
"""Origin of each value, by ``section.key``: ``file:line``, command line or default."""

COMMAND_LINE = "command line"
NEW_DATA = "it applies to the recipe's data only"
OF_THE_DATA = (
    *("source", "mix", "mix_limit", "mix_temperature", "mix_rows"),
    *("revision", "split", "columns", "select", "separator"),
)
NEW_BASE = "it applies to the recipe's base model only"


def parse(
    shortcuts: Mapping[str, Any], words: Sequence[str], *, schema: type[StageSettings]
) -> tuple[dict[str, Any], list[Problem]]:
    """Parse shortcuts and ``section.key=value`` arguments; return the values and the problems.

    Args:
        shortcuts: values by ``section.key``, from options or from Python.
        arguments: the command line's arguments; they override shortcuts.
        schema: the stage's sections.
    """
    # Only the first "=" separates: values may contain more of them.
    pairs = [word.partition("=") for word in words]
    given = {**shortcuts, **{key: yaml_file.scalar(text) for key, equals, text in pairs if equals}}
    problems = [_misunderstood(key, "") for key, equals, _ in pairs if not equals]
    values = {}
    for key, value in given.items():
        section, name, inner = _parts(key)
        if not section or not name or (inner and name not in _named(schema, section)):
            problems.append(_misunderstood(key, value))
        elif section not in schema.model_fields:
            sections = list(schema.model_fields)
            where = f"{key} ({COMMAND_LINE})"
            problems.append(Problem(where, "unknown section", one_of(sections), nearest(section, sections)))
        else:
            values[key] = value
    return values, problems


def override(values: Values, origins: Origins, *, words: dict[str, Any]) -> list[str]:
    """Apply overrides to the recipe's values; return notes on recipe values that no longer apply."""
    before = _method(values)
    # loss=dpo before loss.beta=0.2: a nested key changes the setting that another override may replace.
    for dotted, value in sorted(words.items(), key=lambda word: word[0].count(".")):
        section, key, inner = _parts(dotted)
        content = values.setdefault(section, {})
        content[key] = _within(content.get(key), inner, value) if inner else value
        # The nested key and its setting: problems may refer to either.
        origins[dotted] = origins[f"{section}.{key}"] = COMMAND_LINE
    notes = []
    for dotted, why in dict(_outdated(values, origins)).items():
        section, key = dotted.split(".")
        value = yaml_file.shown(values[section].pop(key))
        notes.append(f"{dotted}={value} ({origins.pop(dotted)}) is ignored: {why}")
    return notes + learning_rate_note(values, origins, before=before)


def _parts(dotted: str) -> tuple[str, str, str]:
    """Split ``section.key.inner`` into its parts, "" for missing ones."""
    section, key, inner = [*dotted.split(".", 2), "", ""][:3]
    return section, key, inner


def _named(schema: type[StageSettings], section: str) -> tuple[str, ...]:
    """Return the keys of a section whose value is a name with its own settings."""
    known = schema.model_fields
    return known[section].annotation.NAMED if section in known else ()  # type: ignore[union-attr]


def _within(current: Any, inner: str, value: Any) -> dict[str, Any]:
    """Return a named setting (a name or a mapping) with one of its inner settings replaced."""
    whole = {"name": current} if isinstance(current, str) else dict(current or {})
    return {**whole, inner: value}


def _misunderstood(key: str, value: Any) -> Problem:
    section, name, *inner = [*key.split("."), "", ""]
    whole = f"{section}.{name}={{{inner[0]}: {value}}}"
    repair = f"set the complete mapping: '{whole}'" if section and name and inner[0] else ""
    return Problem(
        f"'{key}' ({COMMAND_LINE})", "invalid override", "section.key=value, as in train.epochs=3", repair
    )


def _method(values: Values) -> Any:
    return values.get("adapter", {}).get("method", AdapterSettings().method)


def _outdated(values: Values, origins: Origins) -> Iterator[tuple[str, str]]:
    """Yield the recipe's keys that the command line has made obsolete, each with the reason."""
    mine = {key for key, origin in origins.items() if origin == COMMAND_LINE}
    gone = [
        (f"adapter.{key}", f"adapter '{_method(values)}' has no {key}") for key in _foreign_keys(values, mine)
    ]
    # New data: columns, split and the like describe the recipe's data, not the user's.
    if mine & {"data.source", "data.mix"}:
        gone += [(f"data.{key}", NEW_DATA) for key in OF_THE_DATA]
        gone += _held_out_keys(values, mine)
    # trust_remote_code too: the recipe trusted its own base, not this one.
    if "model.base" in mine:
        gone += [(f"model.{key}", NEW_BASE) for key in ("revision", "trust_remote_code", "start")]
    for dotted, why in gone:
        section, key = dotted.split(".")
        if key in values.get(section, {}) and dotted not in mine:
            yield dotted, why


def _foreign_keys(values: Values, mine: set[str]) -> list[str]:
    """Return the keys of the adapter section that the command line's method does not have."""
    method = _method(values)
    if "adapter.method" not in mine or method not in plugin_names(ADAPTERS):
        return []
    known = load_plugin(ADAPTERS, method, where="adapter.method").Settings.model_fields
    return [key for key in values["adapter"] if key not in known]


def _held_out_keys(values: Values, mine: set[str]) -> list[tuple[str, str]]:
    """Return the keys of a held-out file that belongs to replaced data, and of the evals that need one."""
    held_out = values.get("data", {}).get("held_out")
    if not isinstance(held_out, str) or "data.held_out" in mine:
        return []
    why = "it needs held-out rows (data.held_out=0.1 holds out a tenth)"
    return [("data.held_out", NEW_DATA), ("evaluate.exact_match", why), ("train.evaluate_every", why)]


def learning_rate_note(values: Values, origins: Origins, *, before: Any) -> list[str]:
    """Return a note if the recipe's learning rate was chosen for another adapter."""
    method, rate = _method(values), values.get("train", {}).get("learning_rate")
    known = plugin_names(ADAPTERS)
    if method == before or method not in known or before not in known or not isinstance(rate, float):
        return []
    old, usual = (
        load_plugin(ADAPTERS, name, where="adapter.method").TRAITS.learning_rate for name in (before, method)
    )
    # A note and not an override: the recipe's rate may be meant.
    if origins["train.learning_rate"] == COMMAND_LINE or old == usual:
        return []
    return [
        f"train.learning_rate={rate:g} ({origins['train.learning_rate']}) was chosen for adapter '{before}'; "
        f"'{method}' usually needs {usual:g}: train.learning_rate={usual:g}"
    ]
