"""Small tokenizers, models and complete runs of RLOO and GRPO."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.recipe.recipe import read_recipe
from finetune.training.result import Result
from finetune.training.stage import run_stage

FINETUNE = Path(__file__).parents[2] / "finetune"
sys.path += [str(FINETUNE / "data"), str(FINETUNE / "training")]

RECIPE = """\
stage: {stage}
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 6, template: plain, cache: false}}
adapter: {{method: lora, rank: 4, dropout: 0.1}}
train: {{max_steps: 3, batch_size: 8, micro_batch_size: 4, learning_rate: 1e-2, warmup: 0}}
evaluate: {{samples: 2, max_new_tokens: 4}}
rewards: {{sources: [{{function: "{rule}:the"}}]}}
sampling: {{num_generations: 4, max_new_tokens: 6}}
"""
RULE = """\
def the(prompt, completion):
    return completion.count("e") / (1 + len(completion))


def short(prompt, completion):
    return -0.01 * len(completion)


def raises(prompt, completion):
    raise RuntimeError("out of order")


def no_number(prompt, completion):
    return float("nan")
"""
Tune = Callable[..., Result]


@pytest.fixture(scope="session")
def rule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of reward functions."""
    path = tmp_path_factory.mktemp("rule") / "rule.py"
    path.write_text(RULE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def decided_base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random base whose hidden states decide the next token: small updates have an effect."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("decided")
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.get_output_embeddings().weight.data.mul_(20.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def online_recipes(
    decided_base: Path, rule_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return a recipe of each stage."""
    folder = tmp_path_factory.mktemp("online")
    rows = folder / "prompts.jsonl"
    prompts = [{"prompt": f"Add {index} and {index % 7}" + " please" * (index % 3)} for index in range(30)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    for stage in ("rloo", "grpo"):
        text = RECIPE.format(stage=stage, base=decided_base, rows=rows, rule=rule_file)
        (folder / f"{stage}.yaml").write_text(text, encoding="utf-8")
    return {stage: folder / f"{stage}.yaml" for stage in ("rloo", "grpo")}


@pytest.fixture
def tune(online_recipes: dict[str, Path], tmp_path: Path) -> Tune:
    """Return a function that runs a stage; ``train__max_steps=5`` sets ``train.max_steps``."""

    def run(stage: str, name: str = "run", **settings: Any) -> Result:
        given = {key.replace("__", "."): value for key, value in settings.items()}
        recipe = read_recipe(stage, str(online_recipes[stage]), shortcuts=given, out=tmp_path / name)
        return run_stage(recipe, Console(quiet=True), command="a test")

    return run
