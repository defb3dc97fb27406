"""Command-line overrides of a recipe: parse ``section.key=value``, apply, drop obsolete values."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.recipe import yaml_file
from finetune.recipe.discovery import ADAPTERS, load_plugin, plugin_names
from finetune.recipe.errors import Problem, did_you_mean, one_of
from finetune.recipe.foreign_names import foreign_problem
from finetune.recipe.renamed import RENAMED, renamed_section, section_problem
from finetune.recipe.settings import AdapterSettings, StageSettings

SectionValues = dict[str, dict[str, Any]]
"""A recipe's sections before validation: ``{section: {key: value}}``."""

Origins = dict[str, str]
"""Origin of each value, by ``section.key``: ``file:line``, command line or default."""

COMMAND_LINE = "command line"
REPLACED_DATA = "it applies to the recipe's data only"
SOURCE_KEYS = (
    *("source", "mix", "mix_size_cap", "mix_temperature", "epoch_rows"),
    *("revision", "split", "columns", "select", "separator"),
)
REPLACED_BASE = "it applies to the recipe's base model only"
REPLACED_REWARDS = "it combines the recipe's two rewards"
COMBINATION_KEYS = ("combine", "safety_threshold", "unsafe_prompt_fn")


def parse_overrides(
    shortcuts: Mapping[str, Any], arguments: Sequence[str], *, schema: type[StageSettings]
) -> tuple[dict[str, Any], list[Problem]]:
    """Parse shortcuts and ``section.key=value`` arguments; return the values and the problems.

    Args:
        shortcuts: values by ``section.key``, from options or from Python.
        arguments: the command line's arguments; they override shortcuts.
        schema: the stage's sections.
    """
    # Only the first "=" separates: values may contain more of them.
    pairs = [argument.partition("=") for argument in arguments]
    given = {**shortcuts, **{key: yaml_file.parse_scalar(text) for key, equals, text in pairs if equals}}
    problems = [_invalid_override(key, "", schema) for key, equals, _ in pairs if not equals]
    values = {}
    for key, value in given.items():
        section, name, inner = _split_key(key)
        if name and (new := renamed_section(section, schema.model_fields)):
            key = ".".join(filter(None, (name, inner)))
            problems.append(section_problem(f"{section}.{key} ({COMMAND_LINE})", section, key, new))
        elif not section or not name or (inner and name not in _named_choices(schema, section)):
            problems.append(_invalid_override(key, value, schema))
        elif section not in schema.model_fields:
            problems.append(_unknown_section(key, value, schema))
        else:
            values[key] = value
    return values, problems


def apply_overrides(
    values: SectionValues, origins: Origins, *, overrides: dict[str, Any], schema: type[StageSettings]
) -> list[str]:
    """Apply overrides to the recipe's values; return notes on recipe values that no longer apply."""
    previous_method, notes = _method(values), []
    for dotted, value in sorted(overrides.items(), key=_override_order):
        section, key, inner = _split_key(dotted)
        content = values.setdefault(section, {})
        if key in _named_choices(schema, section):
            default = dict(schema.model_fields[section].default)[key]
            content[key], dropped = _set_choice(content.get(key), inner, value, default=default)
            notes += [_dropped_setting(f"{section}.{key}", origins, *setting) for setting in dropped]
        else:
            content[key] = value
        # The nested key and its setting: problems may refer to either.
        origins[dotted] = origins[f"{section}.{key}"] = COMMAND_LINE
    # Collected first: the loop deletes values that the generator reads.
    for dotted, reason in dict(_obsolete_keys(values, origins)).items():
        section, key = dotted.split(".")
        value = yaml_file.format_value(values[section].pop(key))
        notes.append(f"{dotted}={value} ({origins.pop(dotted)}) is ignored: {reason}")
    return notes + learning_rate_note(values, origins, previous_method=previous_method)


def _split_key(dotted: str) -> tuple[str, str, str]:
    """Split ``section.key.inner`` into its parts, "" for missing ones."""
    section, key, inner = [*dotted.split(".", 2), "", ""][:3]
    return section, key, inner


def _named_choices(schema: type[StageSettings], section: str) -> tuple[str, ...]:
    """Return the keys of a section whose value is a name with its own settings."""
    known = schema.model_fields
    return known[section].annotation.NAMED_CHOICES if section in known else ()  # type: ignore[union-attr]


def _override_order(override: tuple[str, Any]) -> tuple[int, bool]:
    """Return a sort key: loss=dpo before loss.name=ipo, and that before loss.beta=0.2."""
    # A nested key changes the setting that another override may replace.
    _, _, inner = _split_key(override[0])
    return bool(inner), inner != "name"


def _set_choice(
    current: Any, inner: str, value: Any, *, default: str
) -> tuple[Any, list[tuple[str, str, Any]]]:
    """Return a named choice (a name, or a mapping of it and its settings) with an override applied.

    Settings of another choice are left out, and returned: (name of the choice, setting, value).

    Args:
        current: the recipe's value.
        inner: the overridden setting of the choice; "": the choice is replaced.
        value: the override.
        default: the name of a mapping without one.
    """
    mapping = {"name": current} if isinstance(current, str) else dict(current or {})
    if inner and inner != "name":
        return {**mapping, inner: value}, []
    previous, settings = mapping.pop("name", default), mapping
    name = value.get("name", default) if isinstance(value, dict) else value
    if name != previous:
        dropped = [(previous, setting, old_value) for setting, old_value in settings.items()]
        return value, dropped
    # The same choice, named again, keeps its settings; a complete mapping replaces them.
    return ({"name": name, **settings} if settings and not isinstance(value, dict) else value), []


def _dropped_setting(dotted: str, origins: Origins, name: str, setting: str, value: Any) -> str:
    origin = origins.get(f"{dotted}.{setting}") or origins.get(dotted, "")
    text = f"{dotted}.{setting}={yaml_file.format_value(value)}"
    return f"{text} ({origin}) is ignored: it is a setting of '{name}'"


def _unknown_section(key: str, value: Any, schema: type[StageSettings]) -> Problem:
    section, name, _ = _split_key(key)
    sections = list(schema.model_fields)
    where, expected = f"{key} ({COMMAND_LINE})", one_of(sections)
    if foreign := foreign_problem(where, name, value, expected=expected, schema=schema):
        return foreign
    return Problem(where, "unknown section", expected, did_you_mean(section, sections))


def _invalid_override(key: str, value: Any, schema: type[StageSettings]) -> Problem:
    section, name, *inner = [*key.split("."), "", ""]
    expected = "section.key=value, as in train.epochs=3"
    if not name and (
        foreign := foreign_problem(
            f"{key} ({COMMAND_LINE})", key, None if value == "" else value, expected=expected, schema=schema
        )
    ):
        return foreign
    if target := RENAMED.get(key):
        # The repair must not name a key that is refused next.
        changed = f"'{section}.{name}={{{target.rpartition('.')[2]}: {value}}}'"
        return Problem(f"'{key}' ({COMMAND_LINE})", f"`{key}` was renamed to `{target}`", changed)
    mapping = f"{section}.{name}={{{inner[0]}: {value}}}"
    repair = f"set the complete mapping: '{mapping}'" if section and name and inner[0] else ""
    return Problem(f"'{key}' ({COMMAND_LINE})", "invalid override", expected, repair)


def _method(values: SectionValues) -> Any:
    return values.get("adapter", {}).get("method", AdapterSettings().method)


def _obsolete_keys(values: SectionValues, origins: Origins) -> Iterator[tuple[str, str]]:
    """Yield the recipe's keys that the command line has made obsolete, each with the reason."""
    overridden = {key for key, origin in origins.items() if origin == COMMAND_LINE}
    obsolete = [
        (f"adapter.{key}", f"adapter '{_method(values)}' has no {key}")
        for key in _foreign_keys(values, overridden)
    ]
    # New data: columns, split and the like describe the recipe's data, not the user's.
    if overridden & {"data.source", "data.mix"}:
        obsolete += [(f"data.{key}", REPLACED_DATA) for key in SOURCE_KEYS]
        obsolete += _held_out_file_keys(values, overridden)
    # trust_remote_code too: the recipe trusted its own base, not this one.
    if "model.base" in overridden:
        obsolete += [
            (f"model.{key}", REPLACED_BASE) for key in ("revision", "trust_remote_code", "init_from")
        ]
    # A number of steps would win over epochs.
    if "train.epochs" in overridden:
        obsolete.append(("train.max_steps", "train.epochs is set"))
    # Variables of the tokenizer's chat template; other templates have none.
    if "data.template" in overridden and values["data"]["template"] != "tokenizer":
        obsolete.append(("data.template_options", f"template '{values['data']['template']}' has no options"))
    # Llama 2's combination is of two rewards, and this is one.
    sources = values.get("rewards", {}).get("sources")
    if "rewards.sources" in overridden and (not isinstance(sources, list) or len(sources) == 1):
        obsolete += [(f"rewards.{key}", REPLACED_REWARDS) for key in COMBINATION_KEYS]
    for dotted, reason in obsolete:
        section, key = dotted.split(".")
        if key in values.get(section, {}) and dotted not in overridden:
            yield dotted, reason


def _foreign_keys(values: SectionValues, overridden: set[str]) -> list[str]:
    """Return the keys of the adapter section that the command line's method does not have."""
    method = _method(values)
    if "adapter.method" not in overridden or method not in plugin_names(ADAPTERS):
        return []
    adapter_keys = load_plugin(ADAPTERS, method, where="adapter.method").Settings.model_fields
    return [key for key in values["adapter"] if key not in adapter_keys]


def _held_out_file_keys(values: SectionValues, overridden: set[str]) -> list[tuple[str, str]]:
    """Return the keys of a held-out file that belongs to replaced data, and of the evals that need one."""
    held_out = values.get("data", {}).get("held_out")
    if not isinstance(held_out, str) or "data.held_out" in overridden:
        return []
    reason = "it needs held-out rows (data.held_out=0.1 holds out a tenth)"
    return [
        ("data.held_out", REPLACED_DATA),
        ("evaluate.exact_match", reason),
        ("evaluate.graders", "it grades the recipe's held-out rows"),
        ("train.evaluate_every", reason),
    ]


def learning_rate_note(values: SectionValues, origins: Origins, *, previous_method: Any) -> list[str]:
    """Return a note if the recipe's learning rate was chosen for another adapter."""
    method, rate = _method(values), values.get("train", {}).get("learning_rate")
    known = plugin_names(ADAPTERS)
    if (
        method == previous_method
        or method not in known
        or previous_method not in known
        or not isinstance(rate, float)
    ):
        return []
    previous_rate, default_rate = (
        load_plugin(ADAPTERS, name, where="adapter.method").TRAITS.learning_rate
        for name in (previous_method, method)
    )
    # A note and not an override: the recipe's rate may be meant.
    if origins["train.learning_rate"] == COMMAND_LINE or previous_rate == default_rate:
        return []
    return [
        f"train.learning_rate={rate:g} ({origins['train.learning_rate']}) was chosen for adapter "
        f"'{previous_method}'; '{method}' usually needs {default_rate:g}: "
        f"train.learning_rate={default_rate:g}"
    ]
