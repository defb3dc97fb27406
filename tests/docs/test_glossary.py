"""The glossary names keys and metrics that exist, in alphabetical order."""

import re

from test_house import ROOT

from finetune.recipe.discovery import ADAPTERS, adapter_settings, plugin_names, stage_names
from finetune.recipe.recipe import stage_settings
from finetune.training.metrics import METRICS

ROW = re.compile(r"^\| \*\*(.+?)\*\* \| (.+?) \| (.*?) ?\|$", re.M)
ROWS = ROW.findall((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))


def recipe_keys() -> set[str]:
    """Return the keys of every stage and adapter."""
    sections = {
        (name, field.annotation)
        for stage in stage_names()
        for name, field in stage_settings(stage).model_fields.items()
    }
    sections |= {("adapter", adapter_settings(method)) for method in plugin_names(ADAPTERS)}
    return {f"{name}.{key}" for name, section in sections for key in getattr(section, "model_fields", {})}


def test_terms_are_in_alphabetical_order() -> None:
    terms = [re.sub(r"[-,]", lambda mark: " " * (mark[0] == "-"), term.lower()) for term, _, _ in ROWS]
    assert len(terms) >= 60
    assert terms == sorted(set(terms))


def test_keys_exist() -> None:
    cells = " ".join(f"{meaning} {names}" for _, meaning, names in ROWS)
    named = {".".join(key.split(".")[:2]) for key in re.findall(r"`([a-z_]+\.[a-z_.]+)[`:]", cells)}
    assert len(named) > 40
    assert named - recipe_keys() == set()


def test_metrics_exist() -> None:
    named = {name for _, _, names in ROWS for name in re.findall(r"`([\w<>]+(?:/[\w<>]+)+)`", names)}
    assert len(named) > 25
    assert named - {name for metric in METRICS for name in metric.names} == set()
