"""Tables of what a recipe can name: stages, recipes, adapters, templates, bases, losses, metrics, GPUs."""

import re
from typing import Any

from align.pipeline.file import pipeline_descriptions
from align.preference.losses.catalog import all_losses
from finetune.distributed.hardware import GIB, GPUS
from finetune.recipe import yaml_file
from finetune.recipe.bases import load_bases
from finetune.recipe.discovery import (
    ADAPTERS,
    TEMPLATES,
    adapter_traits,
    load_plugin,
    plugin_names,
    plugin_summary,
    recipe_names,
    stage_names,
    verb_of,
)
from finetune.training.metrics import EVERY_STAGE, METRICS, Metric
from tools.docs.markdown import code, table

GUIDES = {
    "sft": "sft.md",
    "pretrain": "pretrain.md",
    "reward": "reward.md",
    "dpo": "preferences.md",
    "kto": "preferences.md",
    "chain_of_hindsight": "preferences.md",
    "ppo": "rl.md",
    "rloo": "rl.md",
    "grpo": "rl.md",
    "rejection": "rl.md",
}
"""The page about each stage."""

GUIDE_TITLES = {
    "sft.md": "SFT",
    "pretrain.md": "Continued pretraining",
    "reward.md": "Reward models",
    "preferences.md": "Preferences",
    "rl.md": "RL",
}


def stages(prefix: str = "") -> str:
    """Return the stages: verb, summary, and the page about it; ``prefix`` is the folder of the pages."""
    folder = f"{prefix}/" if prefix else ""
    names = sorted(stage_names(), key=list(GUIDES).index)
    rows = [
        (code(f"llm-align {verb_of(name)}"), _summary(stage_names()[name], name), _guide(folder, name))
        for name in names
    ]
    return table(("command", "method", "guide"), rows)


def recipes(stage: str) -> str:
    """Return a stage's recipes: name, description, base and data."""
    rows = []
    for name, path in recipe_names(stage).items():
        content = yaml_file.read_yaml(path)[0]
        base = content.get("model", {}).get("base", "tiny")
        rows.append((code(name), str(content.get("description", "")), code(base), _data(content)))
    return table(("recipe", "description", "base", "data"), rows)


def pipelines() -> str:
    """Return the pipelines: name and description."""
    rows = [(code(name), line) for name, line in pipeline_descriptions().items()]
    return table(("pipeline", "description"), rows)


def adapters() -> str:
    """Return the adapters: what each does, its paper, and what it can be combined with."""
    rows = []
    for name in plugin_names(ADAPTERS):
        traits = adapter_traits(name)
        paper = re.search(r"arXiv (\d{4}\.\d{4,5})", load_plugin(ADAPTERS, name, where="docs").__doc__ or "")
        link = f" ([{paper[1]}](https://arxiv.org/abs/{paper[1]}))" if paper else ""
        base = ", ".join("unquantized" if kind == "none" else kind for kind in traits.quantization)
        packing = "yes" if traits.packing else "no"
        rate = code(f"{traits.learning_rate:g}")
        summary = f"{_summary(ADAPTERS, name).removesuffix('.')}{link}."
        rows.append((code(name), summary, base, packing, ", ".join(traits.engines), rate))
    return table(("method", "summary", "base", "packing", "engines", "usual learning rate"), rows)


def templates() -> str:
    """Return the prompt templates."""
    rows = [(code(name), _summary(TEMPLATES, name)) for name in plugin_names(TEMPLATES)]
    return table(("template", "format"), rows)


def bases() -> str:
    """Return the short names of base models."""
    rows = [(code(name), code(base.id), base.parameters, base.note) for name, base in load_bases().items()]
    return table(("name", "Hub id or folder", "parameters", "note"), rows)


def losses() -> str:
    """Return the preference losses: data, reference, settings and summary."""
    rows = [
        (
            code(loss.name),
            loss.summary,
            {"Pairs": "pairs", "Lists": "ranked lists"}[loss.takes],
            "yes" if loss.needs.reference else "no",
            ", ".join(code(f"{key}={_number(default)}") for key, default in loss.defaults.items()),
        )
        for loss in all_losses().values()
    ]
    return table(("loss", "summary", "data", "reference", "settings"), rows)


def metrics(stage: str = "") -> str:
    """Return the metrics of a stage, or of all stages."""
    titles = ("metric", "definition", "unit", "better")
    if stage:
        return table(titles, [_metric(metric) for metric in METRICS if stage in metric.stages])
    return table((*titles, "stages"), [(*_metric(metric), _stages(metric)) for metric in METRICS])


def gpus() -> str:
    """Return the GPUs that a plan knows by name."""
    rows = [(code(gpu.name), f"{gpu.memory / GIB:.1f} GiB") for gpu in GPUS.values()]
    return table(("`--gpu`", "memory that PyTorch can allocate"), rows)


def _metric(metric: Metric) -> tuple[str, str, str, str]:
    names = ", ".join(map(code, metric.names))
    return names, metric.formula, metric.unit, metric.better


def _stages(metric: Metric) -> str:
    return "all" if set(metric.stages) == set(EVERY_STAGE) else ", ".join(metric.stages)


def _summary(package: str, name: str) -> str:
    return plugin_summary(package, name).replace("``", "`")


def _guide(folder: str, stage: str) -> str:
    page = GUIDES[stage]
    return f"[{GUIDE_TITLES[page]}]({folder}{page})"


def _data(content: dict[str, Any]) -> str:
    data = content.get("data", {})
    if "mix" in data:
        first, *others = (code(source["source"]) for source in data["mix"])
        return ", ".join([first, *others]) if len(others) < 2 else f"{first} and {len(others)} more"
    return code(str(data.get("source", "")))


def _number(default: bool | float | str) -> str:
    number = isinstance(default, int | float) and not isinstance(default, bool)
    return f"{default:g}" if number else str(default).lower()
