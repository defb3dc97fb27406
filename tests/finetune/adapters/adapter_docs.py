"""Generate finetune/adapters/README.md: the list of adapters, and the tested property matrix.

python tests/finetune/adapters/adapter_docs.py
"""

import re
import warnings
from pathlib import Path

from adapter_matrix import cell
from adapter_properties import FAMILIES, METHODS, PROPERTIES

from finetune.recipe.discovery import ADAPTERS, load_plugin, plugin_names, plugin_summary

README = Path(__file__).parents[3] / "finetune" / "adapters" / "README.md"

HEAD = """# Adapters

One file per adapter: `adapter.method=NAME` is `NAME.py` in this folder. `--adapter NAME` selects it in any
recipe; `llm-align show RECIPE adapter.method=NAME` lists its settings with their defaults. This page is
generated from the files and their tests (`python tests/finetune/adapters/adapter_docs.py`); a test keeps it
up to date.

Adapters of PEFT's own types load with plain `PeftModel.from_pretrained`. `bottleneck`, `adamix` and `bitfit`
are ours, and PEFT's `multitask_prompt` needs a task id per row: `from align import load_tuned` loads any run.
`--from RUN` continues training any of them, including prompt encoders and gates; `loftq` continues as `lora`.

"""

MATRIX = """
## Every adapter, every property

Tested on three model families with random weights ({families}). A number refers to the reason why a
combination is not supported; nothing is skipped.

"""


def render() -> str:
    """Return the page as Markdown."""
    return HEAD + _methods() + MATRIX.format(families=", ".join(FAMILIES)) + _matrix()


def _methods() -> str:
    rows = []
    for name in plugin_names(ADAPTERS):
        module = load_plugin(ADAPTERS, name, where="docs")
        paper = re.search(r"arXiv (\d{4}\.\d{4,5})", module.__doc__ or "")
        link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""
        traits = module.TRAITS
        base = ", ".join("unquantized" if kind == "none" else kind for kind in traits.quantization)
        summary = plugin_summary(ADAPTERS, name)
        packing = "yes" if traits.packing else "no"
        cells = (
            f"`{name}`",
            summary,
            link,
            base,
            packing,
            ", ".join(traits.engines),
            f"{traits.learning_rate:g}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    titles = ("method", "what it does", "paper", "base", "packing", "engines", "usual rate")
    return _table(titles, rows)


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
    README.write_text(render(), encoding="utf-8")
