"""Write the tested property matrix of docs/reference/adapters.md.

python tests/finetune/adapters/adapter_docs.py
"""

import warnings
from pathlib import Path

from adapter_matrix import cell
from adapter_properties import FAMILIES, METHODS, PROPERTIES

from tools.docs.blocks import replace_block

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "adapters.md"


def render() -> str:
    """Return the page with its matrix written from the tests."""
    return replace_block(PAGE.read_text(encoding="utf-8"), "adapter-matrix", _matrix())


def _matrix() -> str:
    reasons: list[str] = []
    rows = []
    for method in METHODS:
        cells = [_cell(name, method, reasons) for name in PROPERTIES]
        rows.append(f"| `{method}` | {' | '.join(cells)} |")
    notes = "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))
    meanings = "".join(
        f"* **{name}**: {(function.__doc__ or '').strip()}\n" for name, function in PROPERTIES.items()
    )
    return _table(("method", *PROPERTIES), rows) + "\n" + notes + "\n" + meanings


def _cell(name: str, method: str, reasons: list[str]) -> str:
    reasons_by_family = {family: cell(name, method, family) for family in FAMILIES}
    refused = {
        reason: [f for f in FAMILIES if reasons_by_family[f] == reason]
        for reason in reasons_by_family.values()
        if reason
    }
    entries = []
    for reason, families in refused.items():
        if reason not in reasons:
            reasons.append(reason)
        where = "" if len(families) == len(FAMILIES) else f"{', '.join(families)}: "
        entries.append(f"{where}({reasons.index(reason) + 1})")
    return "; ".join(entries) if all(reasons_by_family.values()) else "; ".join(["yes", *entries])


def _table(titles: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join([f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}", *rows]) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(render(), encoding="utf-8")
