"""Every shipped recipe loads, states the source of each value, and trains two steps on `tiny`.

The default tests train one recipe of each stage and adapter, the slow ones all. The first ten steps of the
quickstarts are compared in tests/golden_losses/; tests/align/planner/test_plan.py plans every recipe.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.preference.settings import PreferenceSettings
from align.rl.settings import PromptSettings
from finetune.recipe.bases import load_bases
from finetune.recipe.discovery import PROJECT, adapter_settings, stage_names
from finetune.recipe.recipe import Recipe, read_recipe, stage_settings
from finetune.recipe.settings import DocumentSettings
from finetune.training.stage import run_stage

FILES = sorted(file for stage in stage_names() for file in (PROJECT / "recipes" / stage).glob("*.yaml"))
VALUE = re.compile(r"^  (\w+):( \S.*?)?(\s+# (.+))?$")
ENTRY = re.compile(r"^    - ()(\{.*\})(\s+# (.+))$")
every_recipe = pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")

NUMBERS = range(8)
TALKS = [
    {"messages": [{"role": "user", "content": f"{i} + 1"}, {"role": "assistant", "content": f"{i + 1}."}]}
    for i in NUMBERS
]
TEXTS = [{"text": f"{i} and {i + 1}"} for i in NUMBERS]
PAIRS = [{"prompt": f"{i} + 1?", "chosen": f"It is {i + 1}.", "rejected": f"It is {i}."} for i in NUMBERS]
PAIR_SETTINGS = (PreferenceSettings, PromptSettings)


def stand_in_rows(file: Path) -> list[dict[str, Any]]:
    """Return what stands in for the data of a recipe: rows of the kind that its stage reads."""
    data = stage_settings(file.parent.name)().data
    if isinstance(data, PAIR_SETTINGS):
        return PAIRS
    return TEXTS if isinstance(data, DocumentSettings) and file.stem != "pcp" else TALKS


SMALL = {
    "model.base": "tiny",
    "model.revision": None,
    "model.init_from": None,
    "data.mix": None,
    "data.columns": None,
    "data.select": None,
    "data.held_out": 2,
    "data.max_length": 128,
    "data.max_prompt_length": 64,
    "train.max_steps": 2,
    "train.batch_size": 2,
    "train.micro_batch_size": "auto",
    "train.warmup": 0,
    "evaluate.samples": 1,
    "reward.heads": ["reward"],
    "reward.margin_scale": None,
    "rewards.combine": "sum",
    "rejection.rounds": 1,
    "rejection.prompts": None,
    "rejection.num_generations": 2,
    "rejection.truncated": "train",
    "evaluate.max_new_tokens": 4,
}
DRAWN = {
    "data.max_length": None,
    "sampling.max_new_tokens": 4,
    "sampling.num_generations": 2,
    "ppo.rollout_size": 2,
}
"""Beside it for stages that learn from replies that they draw; a rule says what these are worth."""
RULE = "def short(prompt, completion):\n    return -len(completion)\n"
UNMEASURED = {"evaluate.exact_match": 0, "evaluate.graders": {}, "evaluate.retention": None}
"""What needs the recipe's own held-out rows."""


def shipped(file: Path, **further: Any) -> Recipe:
    """Return a recipe with the rows that its user must provide."""
    needs_rows = file.stem == "in-house"
    given = {"data.source": TEXTS} if needs_rows else {}
    return read_recipe(file.parent.name, file.stem, shortcuts=given | further or None)


@every_recipe
def test_it_loads(file: Path) -> None:
    recipe = shipped(file)
    assert recipe.stage == file.parent.name and 20 < len(recipe.description) <= 110
    assert recipe.notes == [] and recipe.settings.model.base in load_bases()


@every_recipe
def test_every_value_has_its_source(file: Path) -> None:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith(" ")]
    assert len(lines) >= 10
    for line in lines:
        match = VALUE.match(line) or ENTRY.match(line)
        assert match, f"one value a line, two blanks of indentation: {line!r}"
        assert match[4] and len(match[4]) > 7, f"no source behind {line!r}"


@every_recipe
def test_sections_and_keys_are_in_one_order(file: Path) -> None:
    text, schema = file.read_text(encoding="utf-8"), stage_settings(file.parent.name).model_fields
    order = ["stage", "description", *schema]
    sections = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert sections == sorted(sections, key=order.index)
    method = re.search(r"^  method: (\w+)", text, re.MULTILINE)
    for section in sections[2:]:
        is_adapter = section == "adapter" and method is not None
        model: Any = adapter_settings(method[1]) if is_adapter and method else schema[section].annotation
        known = list(model.model_fields)
        written = re.findall(r"^  (\w+):", text.split(f"\n{section}:\n")[1].split("\n\n")[0], re.MULTILINE)
        assert written == sorted(written, key=known.index), section


def _by_adapter() -> list[Any]:
    """Return all recipes; those whose stage and adapter an earlier one has, and quickstarts, are slow."""
    seen: set[tuple[str, str]] = set()
    parameters = []
    for file in sorted(FILES, key=lambda file: file.stem == "quickstart"):
        method = re.search(r"^adapter:\n  method: (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        kind = file.parent.name, method[1] if method else "lora"  # the default
        marks = [pytest.mark.slow] if kind in seen else []
        parameters.append(pytest.param(file, marks=marks, id=f"{file.parent.name}-{file.stem}"))
        seen.add(kind)
    return parameters


@pytest.mark.parametrize("file", _by_adapter())
def test_it_takes_two_steps_on_the_embedded_base(file: Path, tmp_path: Path) -> None:
    stage = file.parent.name
    known = stage_settings(stage).model_fields
    wanted = SMALL | UNMEASURED
    if "sampling" in known:
        (tmp_path / "rule.py").write_text(RULE, encoding="utf-8")
        wanted |= DRAWN | {"rewards.sources": [{"function": f"{tmp_path / 'rule.py'}:short"}]}
    small = {key: value for key, value in wanted.items() if _has(known, key)}
    recipe = shipped(file, **small | {"data.source": stand_in_rows(file)})
    recipe = Recipe(stage, file.stem, "", recipe.settings, recipe.origins, out=tmp_path / "run")
    result = run_stage(recipe, Console(quiet=True), command="a test")
    assert result.record["status"] == "finished" and result.metrics[-1]["step"] == 2


def _has(schema: Any, dotted: str) -> bool:
    section, key = dotted.split(".")
    return section in schema and key in schema[section].annotation.model_fields
