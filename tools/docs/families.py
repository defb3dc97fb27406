"""The table of model families, from the results that ``tests/test_families.py`` records."""

import json
from pathlib import Path

from tools.docs.markdown import code, table

RESULTS = Path(__file__).with_suffix(".json")
WORKS, NOT_RUN = "works", "-"


def families() -> str:
    """Return what each family does: ``works``, or the number of the message that refuses it."""
    results: dict[str, dict[str, str]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    messages: list[str] = []
    actions = list(next(iter(results.values())))
    rows = [
        (code(name), *(_cell(outcome, messages) for outcome in outcomes.values()))
        for name, outcomes in results.items()
    ]
    notes = "".join(f"{number}. {message}\n" for number, message in enumerate(messages, 1))
    return f"{table(('family', *actions), rows)}\nThe messages of refused families:\n\n{notes}"


def _cell(outcome: str, messages: list[str]) -> str:
    if outcome in (WORKS, NOT_RUN):
        return outcome
    if outcome not in messages:
        messages.append(outcome)
    return f"refused ({messages.index(outcome) + 1})"
