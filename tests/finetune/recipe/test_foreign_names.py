"""Names of other libraries: complete tables, true keys, and messages that name what is here."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
import trl
from pydantic import TypeAdapter, ValidationError

from align.preference.losses.catalog import all_losses
from finetune.recipe.discovery import ADAPTERS, adapter_settings, plugin_names, stage_names
from finetune.recipe.errors import UserError
from finetune.recipe.foreign_names import CONVERSIONS, VALUES, conversion_tables, counterparts, libraries
from finetune.recipe.recipe import read_recipe, stage_settings
from finetune.recipe.yaml_file import parse_scalar

TRL_CONFIGS = ("SFT", "DPO", "Reward", "KTO", "GRPO", "RLOO", "Model", "DatasetMixture")
KEY_AND_VALUE = re.compile(r"([a-z]+)\.([a-z_]+)=(\{.*\}|\[.*\]|\S+)")


def installed_names() -> dict[str, set[str]]:
    """Return the settings of the installed libraries' configuration classes."""

    def fields(*classes: Any) -> set[str]:
        return {field.name for cls in classes for field in dataclasses.fields(cls)}

    configs = [
        cls for _, cls in inspect.getmembers(peft, inspect.isclass) if issubclass(cls, peft.PeftConfig)
    ]
    quantization = set(inspect.signature(transformers.BitsAndBytesConfig).parameters) - {"kwargs"}
    trl_configs = [getattr(trl, f"{name}Config") for name in TRL_CONFIGS]
    return {
        "transformers": fields(transformers.TrainingArguments) | quantization,
        "TRL": fields(*trl_configs, trl.ScriptArguments) - fields(transformers.TrainingArguments),
        "PEFT": fields(*configs),
    }


@pytest.mark.parametrize("library", ["transformers", "TRL", "PEFT"])
def test_every_setting_of_the_installed_library_is_known(library: str) -> None:
    names = installed_names()[library]
    assert len(names) > 80
    assert sorted(names - set(libraries()[library])) == []


@pytest.mark.parametrize("page", ["axolotl", "llama-factory"])
def test_every_key_of_the_page_is_known(page: str) -> None:
    text = (Path(__file__).parents[3] / f"docs/coming-from/{page}.md").read_text(encoding="utf-8")
    keys = text.partition("## Keys")[2].partition("## Differences")[0]
    cells = [line.split(" | ")[0] for line in keys.splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`(?:trl\.)?([a-z][a-z_0-9]+)[`:]", cell)}
    assert len(names) > 60
    # A cell may have values too: "`optimizer: adamw_bnb_8bit`, `adamw_8bit`".
    values = {value for cases in conversion_tables()[VALUES].values() for value in cases}
    assert sorted(names - {*counterparts(), *values, "stage"}) == []


def sections() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"adapter": [adapter_settings(name) for name in plugin_names(ADAPTERS)]}
    for stage in stage_names():
        for name, field in stage_settings(stage).model_fields.items():
            found.setdefault(name, []).append(field.annotation)
    return found


def test_every_key_of_the_table_exists() -> None:
    known = sections()
    losses = {name for loss in all_losses().values() for name in loss.defaults}
    for name, counterpart in counterparts().items():
        assert counterpart.keys or counterpart.reason, name
        for key in counterpart.keys:
            section, _, inner = key.partition(".")
            setting, _, nested = inner.partition(".")
            exists = key == "--out" or any(setting in schema.model_fields for schema in known[section])
            assert exists and (setting != "loss" or not nested or nested in losses), (name, key)


def test_every_value_of_the_table_is_accepted() -> None:
    tables, known = conversion_tables(), sections()
    texts = [str(text) for cases in tables[VALUES].values() for text in cases.values()]
    pairs = [match.groups() for text in texts for match in KEY_AND_VALUE.finditer(text)]
    assert len(pairs) > 100 and set(tables[VALUES]) | set(tables[CONVERSIONS]) <= {*counterparts(), "stage"}
    for section, key, text in pairs:
        value = parse_scalar(text.rstrip(",:"))
        if (section, key) == ("dpo", "loss"):
            assert (value["name"] if isinstance(value, dict) else value) in all_losses()
        elif (section, key) == ("adapter", "method"):
            assert value in plugin_names(ADAPTERS)
        else:
            assert any(accepts(schema, key, value) for schema in known[section]), (section, key, value)


def accepts(schema: Any, key: str, value: Any) -> bool:
    try:
        TypeAdapter(schema).validate_python({key: value})
    except ValidationError:
        return False
    return key in schema.model_fields


def refused(stage: str, *words: str, recipe: str = "quickstart", **values: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_recipe(stage, recipe, overrides=words, shortcuts=values)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("stage", "word", "key", "repair"),
    [
        ("sft", "train.num_train_epochs=3", "train.epochs", "train.epochs=3"),
        ("sft", "num_train_epochs=3", "train.epochs", "train.epochs=3"),
        ("sft", "adapter.r=8", "adapter.rank", "adapter.rank=8"),
        ("sft", "lora_alpha=16", "adapter.alpha", "adapter.alpha=16"),
        ("sft", "train.lr=1e-4", "train.learning_rate", "train.learning_rate=0.0001"),
        ("sft", "optim.lr=1e-4", "train.learning_rate", "train.learning_rate=0.0001"),
        ("sft", "train.warmup_ratio=0.1", "train.warmup", "train.warmup=0.1"),
        ("sft", "train.bf16=true", "model.precision", "model.precision=bfloat16"),
        ("sft", "train.fp16=false", "model.precision", "remove it"),
        ("sft", "finetuning_type=full", "adapter.method", "adapter.method=full"),
        ("sft", "use_dora=true", "adapter.method", "adapter.method=dora"),
        ("sft", "quantization_bit=8", "model.quantization", "model.quantization=int8"),
        ("sft", "data.cutoff_len=512", "data.max_length", "data.max_length=512"),
        ("sft", "sequence_len=512", "data.max_length", "data.max_length=512"),
        ("sft", "train.max_length=512", "data.max_length", "data.max_length=512"),
        ("sft", "train_on_inputs=true", "data.loss_on", "data.loss_on=all"),
        (
            "sft",
            "train.lr_scheduler_type=constant_with_warmup",
            "train.lr_schedule",
            "train.lr_schedule=constant",
        ),
        ("sft", "train.optim=adamw_bnb_8bit", "train.optimizer", "train.optimizer=adamw_8bit"),
        ("sft", "template=qwen", "data.template", "data.template=qwen"),
        ("sft", "output_dir=my run", "--out", "--out 'my run'"),
        ("dpo", "dpo.beta=0.2", "dpo.loss.beta", "dpo.loss.beta=0.2"),
        ("dpo", "pref_loss=hinge", "dpo.loss", "dpo.loss=hinge"),
        ("kto", "beta=0.2", "kto.beta", "kto.beta=0.2"),
        ("grpo", "beta=0.2", "grpo.beta", "grpo.beta=0.2"),
        ("grpo", "grpo.num_generations=8", "sampling.num_generations", "sampling.num_generations=8"),
        ("ppo", "cliprange=0.1", "ppo.clip_range", "ppo.clip_range=0.1"),
        ("ppo", "lam=0.9", "ppo.gae_lambda", "ppo.gae_lambda=0.9"),
        ("sft", "train.engine_args={lora_r: 8}", "adapter.rank", "adapter.rank=8"),
    ],
)
def test_a_foreign_key_names_ours(stage: str, word: str, key: str, repair: str) -> None:
    [problem] = refused(stage, word)
    assert f"is `{key}` here" in problem
    assert problem.splitlines()[1].startswith(f"    expected: {key}")
    assert problem.splitlines()[2] == f"    repair:   {repair}"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.report_to=wandb", "`report_to` has no counterpart here: a run logs to metrics.jsonl only"),
        ("wandb_project=a", "`wandb_project` has no counterpart here: a run logs to metrics.jsonl"),
        ("train.hub_model_id=a/b", "`hub_model_id` has no counterpart here: a run does not upload anything"),
        ("adapter.modules_to_save=[lm_head]", "`modules_to_save` has no counterpart here: copies of whole"),
        ("adapter.task_type=CAUSAL_LM", "`task_type` has no key here: it follows from the stage"),
        ("num_generations=8", "`num_generations` is `sampling.num_generations`, which this stage does not"),
        ("load_in_4bit=true", "`load_in_4bit` is `adapter.method` or `model.quantization` here"),
    ],
)
def test_a_name_without_counterpart_says_why(word: str, message: str) -> None:
    [problem] = refused("sft", word)
    assert message in problem


@pytest.mark.parametrize(
    "argument",
    [
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "hub_strategy",
        "report_to",
        "trackio_space_id",
        "hub_revision",
    ],
)
def test_what_needs_the_network_is_refused_before_the_start(argument: str) -> None:
    [problem] = refused("sft", **{"train.engine_args": {argument: "x"}})
    assert re.search("a run (does not upload anything|logs to metrics.jsonl only)", problem)
    assert "\n    repair:   remove it; " in problem


def test_a_file_of_another_library_names_every_key(tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yaml"
    file.write_text(
        "base_model: tiny\nadapter: qlora\nlora_r: 16\nsequence_len: 512\nsample_packing: true\n"
        "micro_batch_size: 2\nnum_epochs: 3\nlearning_rate: 2e-4\ndatasets: [{path: a.jsonl}]\n"
    )
    problems = [problem.splitlines()[0] for problem in refused("sft", recipe=str(file))]
    assert problems[:3] == [
        "base_model (axolotl.yaml:1): `base_model` is `model.base` here",
        "adapter (axolotl.yaml:2): `adapter` is `adapter.method` here",
        "lora_r (axolotl.yaml:3): `lora_r` is `adapter.rank` here",
    ]
    assert all(" is `" in problem for problem in problems[:9])


def test_a_stage_of_another_library_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rm.yaml"
    file.write_text("stage: rm\ndata: {source: a.jsonl}\n")
    problems = refused("sft", recipe=str(file))
    assert problems[0].startswith("stage (rm.yaml:1): `rm` is `reward` here\n")
    assert f"llm-align reward {file}" in problems[0]
