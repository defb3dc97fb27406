"""Pages docs/coming-from: every key in their tables exists, ours and TRL's."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import peft
import pytest
import transformers
import trl
from pydantic import BaseModel, TypeAdapter, ValidationError

from align.preference.losses.catalog import all_losses, find_loss
from finetune.recipe.discovery import ADAPTERS, adapter_settings, load_stage, plugin_names, stage_names
from finetune.recipe.engine_arguments import TRAINING_ARGUMENTS, TRL_ARGUMENTS, Passed
from finetune.recipe.errors import UserError
from finetune.recipe.settings import MixedSource, RopeSettings, SelectSettings
from finetune.recipe.yaml_file import parse_scalar

FOLDER = Path(__file__).parents[2] / "docs" / "coming-from"
PAGES = sorted(FOLDER.glob("*.md"))
CODE = re.compile(r"`([^`]+)`")
KEY = re.compile(r"([a-z_]+)\.([a-z_]+)(?:\[\])?(?:\.(\w+))?(?:=(.*))?", re.S)
FILES = (".jsonl", ".json", ".html", ".yaml", ".py", ".csv")
NESTED = {
    ("data", "mix"): MixedSource,
    ("data", "select"): SelectSettings,
    ("model", "rope"): RopeSettings,
}


@dataclass(frozen=True)
class Row:
    heading: str
    cells: list[str]


def table_rows(page: Path) -> Iterator[Row]:
    heading = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| ") and not line.startswith("| ---"):
            yield Row(heading, [cell.strip() for cell in line.strip("|").split(" | ")])


@cache
def sections() -> dict[str, list[type[BaseModel]]]:
    """Return the schemas of each section, over all stages and adapters."""
    schemas: dict[str, list[type[BaseModel]]] = {"adapter": []}
    for stage in stage_names():
        for name, field in load_stage(stage).Settings.model_fields.items():
            if name != "adapter":
                schemas.setdefault(name, []).append(field.annotation)
    schemas["adapter"] += [adapter_settings(name) for name in plugin_names(ADAPTERS)]
    return schemas


def has_field(schemas: list[type[BaseModel]], key: str) -> bool:
    return any(key in schema.model_fields for schema in schemas)


def accepts(schemas: list[type[BaseModel]], key: str, value: object) -> bool:
    for schema in schemas:
        if key in schema.model_fields:
            try:
                TypeAdapter(schema).validate_python({key: value})
            except ValidationError:
                continue
            return True
    return False


def engine_accepts(argument: str) -> bool:
    tables = [TRAINING_ARGUMENTS, *TRL_ARGUMENTS.values()]
    return any(isinstance(table.get(argument), Passed) for table in tables)


def problem_of(code: str) -> str:
    """Return what is wrong with a key of ours; "" if nothing is, or if the code is no key."""
    match = KEY.fullmatch(code)
    if match is None or code.endswith(FILES):
        return ""
    section, key, inner, text = match.groups()
    if section not in sections():
        return "" if section in ("align", "trl") else f"no section '{section}'"
    schemas = sections()[section]
    if not has_field(schemas, key):
        return f"no key '{section}.{key}'"
    if (section, key) == ("train", "engine_args"):
        return "" if inner is None or engine_accepts(inner) else f"no engine takes '{inner}'"
    if (section, key) == ("dpo", "loss") and inner:
        return (
            "" if any(inner in loss.defaults for loss in all_losses().values()) else f"no loss has '{inner}'"
        )
    if inner:
        schemas, key = [NESTED[section, key]], inner
        if not has_field(schemas, key):
            return f"no key '{code}'"
    return _problem_of_value(schemas, section, key, text) if text is not None else ""


def _problem_of_value(schemas: list[type[BaseModel]], section: str, key: str, text: str) -> str:
    value = parse_scalar(text)
    if (section, key) == ("dpo", "loss"):
        name, settings = (value, {}) if isinstance(value, str) else (value.pop("name"), value)
        try:
            find_loss(name, where="dpo.loss").settings(settings, where="dpo.loss")
        except UserError as error:
            return str(error)
        return ""
    if (section, key) == ("adapter", "method"):
        return "" if value in plugin_names(ADAPTERS) else f"no adapter '{value}'"
    return "" if accepts(schemas, key, value) else f"{section}.{key} refuses {value!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_our_keys_exist(page: Path) -> None:
    codes = [code for row in table_rows(page) for code in CODE.findall(row.cells[-1])]
    assert sum(KEY.fullmatch(code) is not None for code in codes) > 50
    assert {code: problem for code in codes if (problem := problem_of(code))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "train.epoch",
        "model.start",
        "trian.epochs",
        "adapter.width",
        "data.mix[].size",
        "train.lr_schedule=cosin",
        "adapter.method=loras",
        "dpo.loss={name: ipo, gamma: 1}",
        "dpo.loss.gama",
        "train.engine_args.report_to",
        "train.engine_args.warmup_ratio",
        "train.engine_args.dataloader_num_workers",
    ],
)
def test_a_wrong_key_is_found(code: str) -> None:
    assert problem_of(code) != ""


def config_classes(heading: str) -> list[type]:
    if heading == "TrainingArguments":
        return [transformers.TrainingArguments]
    if heading == "ModelConfig":
        return [trl.ModelConfig, peft.LoraConfig]
    found = getattr(trl, heading, None) if re.fullmatch(r"\w+(Config|Arguments)", heading) else None
    return [found] if found else []


def test_trl_keys_are_fields_of_the_installed_classes() -> None:
    rows = list(table_rows(FOLDER / "trl.md"))
    headings = {row.heading for row in rows if config_classes(row.heading)}
    assert len(headings) == 9
    unknown = [
        (row.heading, code)
        for row in rows
        if row.heading in headings and row.cells[0] != "TRL"
        for code in CODE.findall(row.cells[0])
        if not any(code in {field.name for field in fields(c)} for c in config_classes(row.heading))
    ]
    assert unknown == []


def test_trl_losses_are_those_of_the_installed_version() -> None:
    described = next(field.metadata["help"] for field in fields(trl.DPOConfig) if field.name == "loss_type")
    offered = set(re.findall(r"'(\w+)'", described))
    rows = [row for row in table_rows(FOLDER / "trl.md") if row.heading == "Losses of DPO"]
    named = {code for row in rows[1:] for code in CODE.findall(row.cells[0])}
    assert named == offered
    values = [parse_scalar(code) for row in rows[1:] for code in CODE.findall(row.cells[1])]
    ours = {value["name"] if isinstance(value, dict) else value for value in values}
    assert ours <= set(all_losses())


def test_the_page_names_the_installed_versions() -> None:
    text = (FOLDER / "trl.md").read_text(encoding="utf-8")
    for name, version in (("TRL", trl.__version__), ("transformers", transformers.__version__)):
        assert f"{name} {'.'.join(version.split('.')[:2])}" in text
