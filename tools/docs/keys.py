"""Tables of recipe keys: default and meaning, from the settings that declare them."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from finetune.recipe.discovery import ADAPTERS, adapter_settings, plugin_names, stage_names
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.recipe import stage_settings
from finetune.recipe.settings import AdapterSettings, Section
from tools.docs.markdown import code, table, value

TITLES = ("key", "meaning", "default", "values")
Row = tuple[str, str, str, str]


def section_keys(section: str, stage: str = "") -> str:
    """Return a section's keys: those of a stage, or of the first stage that has the section.

    ``data.select`` returns the keys below ``data.select`` alone.

    Raises:
        KeyError: no stage has this section.
    """
    section, _, inner = section.partition(".")
    sections = _classes(section)
    settings = sections[stage] if stage else _common(section, sections)
    prefix = f"`{section}.{inner}." if inner else ""
    return table(TITLES, [row for row in _rows(section, settings) if row[0].startswith(prefix)])


def all_keys() -> str:
    """Return the keys of every section of every stage; a stage's own ones follow those of all stages."""
    parts = []
    for section in _section_names():
        sections = _classes(section)
        shared = _common(section, sections)
        everywhere = len(sections) == len(stage_names()) or list(sections) == [section]
        only = "" if everywhere else f" ({', '.join(sections)})"
        parts.append(f"## {section}{only}\n\n{_summary(shared)}\n\n{table(TITLES, _rows(section, shared))}")
        for names, settings in _variants(sections, shared):
            rows = [row for row in _rows(section, settings) if row not in list(_rows(section, shared))]
            heading = f"### {section} of {', '.join(names)}"
            parts.append(f"{heading}\n\n{_summary(settings)}\n\n{table(TITLES, rows)}")
    return "\n".join(parts)


def adapter_keys() -> str:
    """Return each adapter's keys."""
    parts = []
    for method in plugin_names(ADAPTERS):
        rows = [row for row in _rows("adapter", adapter_settings(method)) if row[0] != "`adapter.method`"]
        parts.append(f"### {method}\n\n" + (table(TITLES, rows) if rows else "It has no settings.\n"))
    return "\n".join(parts)


def option_rows(settings: type[Section]) -> list[Row]:
    """Return the rows of settings that are not a section of a recipe."""
    rows = _rows("options", settings)
    return [
        (key.replace("`options.", "`"), meaning, default, values) for key, meaning, default, values in rows
    ]


def _section_names() -> list[str]:
    """Return all sections: those of every stage first, then each stage's own."""
    names = [name for stage in stage_names() for name in stage_settings(stage).model_fields]
    return sorted(dict.fromkeys(names), key=lambda name: (-names.count(name), names.index(name)))


def _classes(section: str) -> dict[str, type[Section]]:
    """Return the settings class that each stage with this section has for it."""
    fields = {stage: stage_settings(stage).model_fields.get(section) for stage in stage_names()}
    classes = {stage: _section_class(field.annotation) for stage, field in fields.items() if field}
    if not classes:
        raise KeyError(f"no stage has a section '{section}'")
    return classes


def _common(section: str, sections: dict[str, type[Section]]) -> type[Section]:
    """Return the class that the other stages' classes extend, or the one of the first stage."""
    if section == "adapter":
        return adapter_settings(AdapterSettings().method)
    chosen = list(sections.values())
    for candidate in dict.fromkeys(chosen):
        if all(issubclass(other, candidate) for other in chosen):
            return candidate
    return sections.get("sft", chosen[0])


def _variants(
    sections: dict[str, type[Section]], shared: type[Section]
) -> Iterator[tuple[list[str], type[Section]]]:
    by_class: dict[type[Section], list[str]] = {}
    for stage, settings in sections.items():
        if settings not in (shared, AdapterSettings):
            by_class.setdefault(settings, []).append(stage)
    for settings, names in by_class.items():
        yield names, settings


def _rows(prefix: str, settings: type[Section]) -> Iterator[Row]:
    for name, field in settings.model_fields.items():
        key = f"{prefix}.{name}"
        yield code(key), _meaning(field), _default(field), values_text(field.annotation)
        inner = _inner_section(field.annotation)
        if inner is not None:
            yield from _rows(f"{key}[]" if _is_list(field.annotation) else key, inner)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Section):
        return ""
    return value(default)


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("``", "`")


def _summary(settings: type[Section]) -> str:
    return (settings.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("``", "`")


def values_text(annotation: Any) -> str:
    """Return what a key accepts, in words: names of choices, or a type.

    >>> values_text(Literal["a", "b"] | None)
    '`a`, `b`, `null`'
    """
    return ", ".join(dict.fromkeys(_alternatives(annotation)))


def _alternatives(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from _alternatives(argument)
    elif origin is Literal:
        yield from (value(argument) for argument in get_args(annotation))
    elif origin is list:
        yield "list"
    elif origin is dict:
        yield "mapping"
    elif annotation in (None, type(None)):
        yield "`null`"
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield "section"
    else:
        names = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", PythonRows: "text"}
        # In a recipe file, rows are named by a text.
        yield names.get(annotation, "any")


def _inner_section(annotation: Any) -> type[Section] | None:
    """Return the section that a key holds, or that each entry of its list holds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_inner_section(argument) for argument in get_args(annotation))
    return next((section for section in inner if section is not None), None)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(_is_list(argument) for argument in get_args(annotation))


def _section_class(annotation: Any) -> type[Section]:
    section = _inner_section(annotation)
    assert section is not None, f"{annotation} is no section"
    return section
