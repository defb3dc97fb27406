"""The table of renames between two checkouts: read by ``compare_ast.py`` and ``compare_losses.py``.

Tab-separated lines ``kind  old  new``, with the kinds:

    module   dotted names of a module before and after it was moved
    name     an identifier: a function, class, constant, method, field, parameter or keyword
    stage    a stage of recipes
    key      a recipe key as ``section.key``, or ``stage:section.key`` where only one stage has it
    value    a value of a recipe key: ``section.key=old`` and ``section.key=new``
    metric   a metric's name, or ``stage:name`` where only one stage renames it; ``*`` at the end of both
             keeps what follows (``held_out_*`` and ``eval/*``)

Blank lines and lines that begin with ``#`` are left out.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("module", "name", "stage", "key", "value", "metric")


@dataclass(frozen=True)
class Renames:
    """Old names and what they became. Identifiers may have several new names, one for each thing named so."""

    modules: dict[str, str] = field(default_factory=dict)
    names: dict[str, set[str]] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)

    def stage(self, name: str) -> str:
        """Return a stage's verb on the command line."""
        return self.stages.get(name, name).replace("_", "-")

    def override(self, text: str, stage: str) -> str:
        """Translate ``section.key=value``.

        >>> Renames(keys={"ppo.trace": "ppo.gae_lambda"}).override("ppo.trace=0.9", "ppo")
        'ppo.gae_lambda=0.9'
        """
        key, _, value = text.partition("=")
        new = self.keys.get(f"{stage}:{key}", self.keys.get(key, key))
        changed = self.values.get(text)
        return changed or f"{new}={value}"

    def metric(self, name: str, stage: str) -> str:
        """Translate a metric's name; the longest prefix with a ``*`` serves where no whole name does.

        >>> Renames(metrics={"held_out_*": "eval/*", "ends": "eos_rate"}).metric("held_out_ends", "ppo")
        'eval/eos_rate'
        """
        for key in (f"{stage}:{name}", name):
            if key in self.metrics:
                return self.metrics[key]
        prefixes = [
            key for key in self.metrics if key.endswith("*") and name.startswith(key[:-1]) and key != "*"
        ]
        if prefixes:
            prefix = max(prefixes, key=len)
            return self.metrics[prefix][:-1] + self.metric(name[len(prefix) - 1 :], stage)
        return name


def read_renames(file: Path) -> Renames:
    """Read a table.

    Raises:
        SystemExit: a line is not of the form above; the message has its file and number.
    """
    names: dict[str, set[str]] = defaultdict(set)
    tables: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = line.split("\t")
        if len(cells) != 3 or cells[0] not in KINDS:
            raise SystemExit(f"{file}:{number}: expected 'kind<TAB>old<TAB>new', one of {', '.join(KINDS)}")
        kind, old, new = cells
        if kind == "name":
            names[old].add(new)
        else:
            tables[kind][old] = new
    return Renames(
        tables["module"], dict(names), tables["stage"], tables["key"], tables["value"], tables["metric"]
    )
