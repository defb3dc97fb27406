"""The collected compatibility rules: each has a source, a text, and settings that violate it."""

import json
import re
from pathlib import Path

import pytest

from finetune.distributed.solver import collected_rules, solver_rules
from finetune.recipe.compatibility import Rule, problems_of
from finetune.recipe.discovery import ADAPTERS, PROJECT, adapter_settings, plugin_names, stage_names
from finetune.recipe.recipe import stage_settings
from finetune.recipe.rules import cross_field_problems, recipe_properties, rules_of

RULES = {rule.name: rule for rule in collected_rules()}
LOADING = {name: rule for name, rule in RULES.items() if rule.problem is not None or rule.find is not None}

VIOLATIONS: dict[str, tuple[str, dict[str, dict[str, object]]]] = {
    "base": ("sft", {"model": {"base": "./nowhere"}}),
    "flash-float32": ("sft", {"model": {"attention": "flash_attention_2", "precision": "float32"}}),
    "template": ("sft", {"data": {"template": "alpacca"}}),
    "sources": ("sft", {"data": {"source": None}}),
    "mixture": ("sft", {"data": {"mix_temperature": 2.0}}),
    "select": ("sft", {"data": {"select": {"min_score": 4.0}}}),
    "held-out": ("sft", {"data": {"held_out": "rows.jsonl"}}),
    "held-out-evals": ("sft", {"train": {"evaluate_every": 10}}),
    "graders": ("sft", {"evaluate": {"graders": {"happy": "happy.py:end"}}}),
    "quantization": ("sft", {"model": {"quantization": "nf4"}, "adapter": {"method": "full"}}),
    "packing-virtual-tokens": ("sft", {"data": {"packing": True}, "adapter": {"method": "prefix"}}),
    "packing-trl": ("sft", {"data": {"packing": True}, "train": {"engine": "trl"}}),
    "engine": ("sft", {"train": {"engine": "trl"}, "adapter": {"method": "lora_plus"}}),
    "engine-args": ("sft", {"train": {"engine_args": {"save_only_model": True}}}),
    "gradient-checkpointing": (
        "sft",
        {"train": {"gradient_checkpointing": True}, "adapter": {"method": "prefix"}},
    ),
    "neftune-trl": (
        "sft",
        {"train": {"neftune_alpha": 5.0, "engine": "trl"}, "adapter": {"method": "prompt"}},
    ),
    "classification-loss": (
        "sft",
        {"evaluate": {"classification": True}, "data": {"loss_on": "all"}},
    ),
    "micro-batch": ("sft", {"train": {"micro_batch_size": 64}}),
    "micro-batch-trl": (
        "sft",
        {"train": {"engine": "trl", "batch_size": 32, "micro_batch_size": 5, "num_processes": 1}},
    ),
    "adalora-budget": ("sft", {"adapter": {"method": "adalora", "init_rank": 2}}),
    "multitask-prompt-source": ("sft", {"adapter": {"method": "multitask_prompt", "source": "nowhere"}}),
    "progressive-prompt-previous": (
        "sft",
        {"adapter": {"method": "progressive_prompt", "previous": "nowhere"}},
    ),
    "control-texts": ("chain_of_hindsight", {"chain_of_hindsight": {"good": "Write.", "bad": "Write."}}),
    "preference-select": ("kto", {"data": {"select": {"rows": 3}}}),
    "prompt-length": ("reward", {"data": {"max_prompt_length": 64, "max_length": 64}}),
    "dpo-loss": ("dpo", {"dpo": {"loss": "nothing"}}),
    "preference-neftune": ("kto", {"train": {"neftune_alpha": 5.0}}),
    "dpo-label-smoothing": ("dpo", {"train": {"label_smoothing": 0.1}}),
    "dpo-packing": ("dpo", {"data": {"packing": True}}),
    "live-reference-full": ("dpo", {"dpo": {"reference": "live"}, "adapter": {"method": "full"}}),
    "chosen-logp-stop": ("dpo", {"dpo": {"max_chosen_logp_drop": 0.5}}),
    "live-reference-trl": ("dpo", {"dpo": {"reference": "live"}, "train": {"engine": "trl"}}),
    "trl-loss": ("dpo", {"dpo": {"loss": "cdpo"}, "train": {"engine": "trl"}}),
    "trl-reference": ("dpo", {"train": {"engine": "trl"}, "adapter": {"method": "pissa"}}),
    "trl-reference-only": ("kto", {"adapter": {"method": "pissa"}}),
    "online-neftune": ("rloo", {"train": {"neftune_alpha": 5.0}}),
    "rl-label-smoothing": ("grpo", {"train": {"label_smoothing": 0.1}}),
    "group-size": ("grpo", {"train": {"batch_size": 31}}),
    "rl-exact-match": ("ppo", {"evaluate": {"exact_match": 5}, "data": {"held_out": 5}}),
    "grpo-reference-full": ("grpo", {"adapter": {"method": "full"}}),
    "rloo-reference-full": ("rloo", {"adapter": {"method": "full"}}),
    "kto-label-smoothing": ("kto", {"train": {"label_smoothing": 0.1}}),
    "kto-micro-batch": ("kto", {"train": {"micro_batch_size": 1}}),
    "rewards": ("ppo", {"rewards": {"sources": []}}),
    "reward-base": ("ppo", {"rewards": {"sources": [{"run": "run"}]}, "model": {"base": "llama-2-7b"}}),
    "reward-template": ("ppo", {"rewards": {"sources": [{"run": "run"}]}, "data": {"template": "chatml"}}),
    "native-only": ("ppo", {"train": {"engine": "trl"}}),
    "ppo-neftune": ("ppo", {"train": {"neftune_alpha": 5.0}}),
    "ppo-sizes": ("ppo", {"ppo": {"rollout_size": 33}}),
    "value-init": ("ppo", {"ppo": {"value_init": "reward"}}),
    "ppo-ptx": ("ppo", {"pretraining": {"weight": 1.0}}),
    "rejection-evaluate-every": ("rejection", {"train": {"evaluate_every": 10}, "data": {"held_out": 5}}),
    "rejection-overflow": ("rejection", {"data": {"overflow": "truncate"}}),
    "rejection-exact-match": ("rejection", {"evaluate": {"exact_match": 5}, "data": {"held_out": 5}}),
    "top-fraction": ("rejection", {"rejection": {"top_fraction": 0.5}}),
    "rejection-rounds": ("rejection", {"rejection": {"rounds": 2}, "adapter": {"method": "loftq"}}),
    "trl-single-head": ("reward", {"reward": {"heads": ["a", "b"]}, "train": {"engine": "trl"}}),
    "reward-label-smoothing": ("reward", {"train": {"label_smoothing": 0.1}}),
    "reward-neftune-alpha": ("reward", {"train": {"neftune_alpha": 5.0}}),
    "reward-packing": ("reward", {"data": {"packing": True}}),
    "reward-exact-match": ("reward", {"evaluate": {"exact_match": 5}, "data": {"held_out": 5}}),
    "reward-graders": (
        "reward",
        {"evaluate": {"graders": {"good": "good.py:good"}}, "data": {"held_out": 5}},
    ),
    "reward-retention": ("reward", {"evaluate": {"retention": "rows.jsonl"}}),
    "reward-head": ("reward", {"adapter": {"method": "llama_adapter"}}),
    "reward-heads": ("reward", {"reward": {"heads": ["a", "a"]}}),
    "reward-functions": ("reward", {"reward": {"rules": [{"name": "x", "function": "x.py:x"}]}}),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with rows, a reward function and the record of a reward run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "good.py").write_text("def good(prompt, completion):\n    return 1.0\n")
    (tmp_path / "run").mkdir()
    record = {"status": "finished", "recipe": "quickstart", "digest": "0", "format": 2, "stage": "reward"}
    record |= {"files": {"run.json": ""}}
    reload = {"heads": ["reward"], "rules": [], "model": {"base": "tiny"}, "template": "alpaca"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"reload": reload}))
    return tmp_path


def test_every_rule_that_is_evaluated_at_loading_has_a_violation() -> None:
    assert set(VIOLATIONS) == set(LOADING)
    # The others are evaluated at the launch of a run: cases in tests/finetune/distributed/test_solver.py.
    assert set(RULES) - set(LOADING) <= {rule.name for rule in solver_rules()}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_settings_violate_the_rule(folder: Path, name: str) -> None:
    stage, changes = VIOLATIONS[name]
    schema = stage_settings(stage)
    sections: dict[str, object] = {"data": {"source": "rows.jsonl", "template": "alpaca"}}
    if "rewards" in schema.model_fields:
        sections["rewards"] = {"sources": [{"function": "good.py:good"}]}
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}  # type: ignore[dict-item]
    if "adapter" in changes:
        method = str(changes["adapter"]["method"])
        sections["adapter"] = adapter_settings(method).model_validate(changes["adapter"])
    settings = schema.model_validate(sections)
    valid = schema.model_fields
    method = settings.adapter.method
    rule = next(rule for rule in rules_of(stage, method) if rule.name == name)
    found = problems_of([rule], settings, recipe_properties(stage, settings, valid), valid)
    assert found and all(problem.where and problem.actual and problem.expected for problem in found)
    assert not any("{" in problem.expected for problem in found), "a text that was not formatted"
    assert all(problem in cross_field_problems(stage, settings, valid) for problem in found)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_a_source_and_a_text(name: str) -> None:
    rule = RULES[name]
    assert rule.source and rule.describe()
    assert rule.when or rule.reads
    assert (rule.find is not None) == bool(rule.reads), "a check that needs code says what it reads"
    own_files = re.findall(r"\b(?:finetune|align|data_templates)/[a-z_/]+\.py", rule.source)
    assert [file for file in own_files if not (PROJECT / file).is_file()] == []


def test_names_of_rules_are_unique_within_a_recipe() -> None:
    for stage in stage_names():
        for method in plugin_names(ADAPTERS):
            names = [rule.name for rule in rules_of(stage, method)]
            assert len(names) == len(set(names))


def test_a_value_model_starts_from_the_adapter_of_a_reward_run(folder: Path) -> None:
    schema = stage_settings("ppo")
    sections = {"rewards": {"sources": [{"run": "run"}]}, "ppo": {"value_init": "reward"}}
    settings = schema.model_validate({"data": {"source": "rows.jsonl"}, **sections})

    def problems() -> list[str]:
        found = cross_field_problems("ppo", settings, schema.model_fields)
        return [problem.actual for problem in found if problem.where == "ppo.value_init"]

    assert problems() == []
    (folder / "run" / "model").mkdir()  # after full fine-tuning
    assert problems() == ["'reward', but no source is a reward model with an adapter"]


def test_a_rule_of_unknown_properties_does_not_apply() -> None:
    rule = Rule("float16", {"model.precision": ("float16",), "device": ("cpu",)}, source="a test")
    assert rule.applies({"model.precision": "float16", "device": "cpu"})
    assert not rule.applies({"model.precision": "float16"}), "the hardware is not known yet"
    assert not rule.applies({"device": "cpu"}), "an invalid section"


def test_shared_rules_name_their_stages() -> None:
    assert RULES["trl-only"].when["stage"] == ("grpo", "kto", "rloo")
    assert RULES["consistency"].when["stage"] == ("dpo", "ppo")
