"""Small reward runs on the shared random base."""

import json
from pathlib import Path

import pytest
from reward_sections import PAIRS, REWARD_FUNCTIONS

from align import load_recipe, run


def _run(base: Path, folder: Path, name: str, **settings: object) -> Path:
    given = {
        "data.source": str(folder / "pairs.jsonl"),
        "data.held_out": 4,
        "data.cache": False,
        "data.template": "plain",
        "model.precision": "float32",
        "train.max_steps": 3,
        "train.batch_size": 4,
        "train.learning_rate": 1e-2,
        "evaluate.samples": 1,
    }
    more = {key.replace("__", "."): value for key, value in settings.items()}
    out = folder / name
    return run(
        load_recipe("quickstart", stage="reward", base=str(base), out=out, settings=given | more)
    ).directory


@pytest.fixture(scope="session")
def rewards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with comparisons and reward functions."""
    folder = tmp_path_factory.mktemp("rl_rewards")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (folder / "programs.py").write_text(REWARD_FUNCTIONS)
    return folder


@pytest.fixture(scope="session")
def lone_run(base_folder: Path, rewards_folder: Path) -> Path:
    """Return a reward run with one head and a rule."""
    rules = [{"name": "brief", "function": f"{rewards_folder}/programs.py:brief", "weight": 0.5}]
    return _run(base_folder, rewards_folder, "lone", reward__rules=rules)


@pytest.fixture(scope="session")
def two_headed(base_folder: Path, rewards_folder: Path) -> Path:
    """Return a reward run with Llama 2's two heads."""
    source = str(rewards_folder / "pairs.jsonl")
    heads = ["helpfulness", "safety"]
    mix = [{"source": source, "head": head} for head in heads]
    more = {"data__source": None, "data__mix": mix, "reward__heads": heads}
    return _run(base_folder, rewards_folder, "two", **more)


@pytest.fixture(scope="session")
def whole_run(base_folder: Path, rewards_folder: Path) -> Path:
    """Return a reward run with full fine-tuning."""
    return _run(base_folder, rewards_folder, "whole", adapter__method="full", train__learning_rate=1e-3)


@pytest.fixture(scope="session")
def talker_run(base_folder: Path, rows_file: Path, rewards_folder: Path) -> Path:
    """Return an sft run, which is not a reward model."""
    settings = {
        "model.precision": "float32",
        "data.held_out": 0,
        "data.max_length": 128,
        "data.template": "plain",
        "train.max_steps": 1,
        "train.batch_size": 4,
        "evaluate.samples": 1,
        "evaluate.exact_match": 0,
        "evaluate.max_new_tokens": 4,
    }
    recipe = load_recipe(
        "quickstart",
        base=str(base_folder),
        data=str(rows_file),
        out=rewards_folder / "talker",
        settings=settings,
    )
    return run(recipe).directory
