"""Tables of other libraries' names and of what is here instead."""

from finetune.recipe.foreign_names import (
    CONVERSIONS,
    VALUES,
    Counterpart,
    conversion_tables,
    libraries,
)
from tools.docs.markdown import code, table


def names() -> str:
    """Return a table for each library: the names that have a key here, then those that have none."""
    parts = []
    for library, entries in libraries().items():
        groups: dict[Counterpart, list[str]] = {}
        for name, counterpart in sorted(entries.items()):
            groups.setdefault(counterpart, []).append(name)
        ordered = sorted(groups.items(), key=lambda item: (not item[0].keys, item[0].keys, item[0].reason))
        rows = ((", ".join(map(code, group)), _here(counterpart)) for counterpart, group in ordered)
        parts.append(f"## {library[:1].upper()}{library[1:]}\n\n{table(('their names', 'here'), rows)}")
    return "\n".join(parts)


def values() -> str:
    """Return what to write for names whose value is another one here."""
    tables = conversion_tables()
    rows = [
        (code(name), "; ".join(f"{code(_spelled(value))}: {text}" for value, text in cases.items()))
        for name, cases in sorted(tables[VALUES].items())
    ]
    rows += [(code(name), text) for name, text in sorted(tables[CONVERSIONS].items())]
    return table(("name", "what to write"), rows)


def _here(counterpart: Counterpart) -> str:
    if counterpart.keys:
        return " or ".join(code(key) for key in counterpart.keys)
    return counterpart.reason.removeprefix("has ").removesuffix(" ")


def _spelled(value: str) -> str:
    return value.lower() if value in ("True", "False") else value
