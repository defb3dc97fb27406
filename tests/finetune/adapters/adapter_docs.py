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
        missing = _unsupported_families(method)
        families = ", ".join(f"not {family} {_note(reason, reasons)}" for family, reason in missing.items())
        supported = [family for family in FAMILIES if family not in missing]
        cells = [_cell(name, method, supported, reasons) for name in PROPERTIES]
        rows.append(f"| `{method}` | {families or 'all'} | {' | '.join(cells)} |")
    notes = "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))
    meanings = "".join(
        f"* **{name}**: {(function.__doc__ or '').strip()}\n" for name, function in PROPERTIES.items()
    )
    return (
        _table(("method", "families", *PROPERTIES), rows) + "\n" + notes + "\nThe properties:\n\n" + meanings
    )


def _unsupported_families(method: str) -> dict[str, str]:
    """Return the families that an adapter does not support at all, with the reason."""
    by_family = {family: {cell(name, method, family) for name in PROPERTIES} for family in FAMILIES}
    return {family: reason for family, (reason, *others) in by_family.items() if reason and not others}


def _cell(name: str, method: str, families: list[str], reasons: list[str]) -> str:
    by_family = {family: cell(name, method, family) for family in families}
    entries = []
    for reason in dict.fromkeys(filter(None, by_family.values())):
        refused = [family for family in families if by_family[family] == reason]
        where = "" if refused == families else f"{', '.join(refused)}: "
        entries.append(where + _note(reason, reasons))
    return "; ".join(entries) if all(by_family.values()) else "; ".join(["yes", *entries])


def _note(reason: str, reasons: list[str]) -> str:
    if reason not in reasons:
        reasons.append(reason)
    return f"({reasons.index(reason) + 1})"


def _table(titles: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join([f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}", *rows]) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(render(), encoding="utf-8")
