"""The PPO benchmarks on a model of one narrow layer: preparation and comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from align import load_recipe, run
from benchmarks import ppo, ppo_native
from benchmarks.ppo_work import SPECIAL_TOKENS, BaseShape, as_text, prepare_work, run_recipe, word_tokenizer
from finetune.recipe.recipe import Recipe

COMPARED_METRICS = (
    "objective/reward",
    "objective/kl_per_completion",
    "objective/shaped_reward",
    "policy/entropy",
    "val/completion_length",
    "loss/policy",
    "loss/value",
    "value/explained_variance",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ppo")
    work = prepare_work(path, BaseShape(64, 1, 64), bfloat16=False, rollouts=1, epochs=2)
    assert json.loads((path / "work.json").read_text()) == work
    return path


def run_metrics(folder: Path, contender: str) -> list[dict[str, Any]]:
    """Run a contender on less work, in this process; return its metrics.jsonl."""
    work = json.loads((folder / "work.json").read_text()) | {"new_tokens": 6}
    rows = [{"prompt": as_text(ids)} for ids in work["prompts"]]
    runner = ppo_native.run_four_models if contender == "four-models" else run
    sections = ppo_native.recipe_sections(folder, work, contender)
    run_dir = run_recipe(folder, "ppo", rows, sections, bfloat16=False, name=contender, runner=runner)
    assert json.loads((run_dir / "run.json").read_text())["data"]["longest"] == len(work["prompts"][0]) == 96
    return [json.loads(text_line) for text_line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_word_tokenizer() -> None:
    tokenizer = word_tokenizer()
    ids = [0, 17, 31994, 17]
    assert tokenizer(as_text(ids))["input_ids"] == ids
    assert tokenizer("\n" + as_text(ids))["input_ids"][1:] == ids
    assert tokenizer.decode(ids) == as_text(ids) == "w0 w17 w31994 w17"
    assert len(tokenizer) == 32_000 and tokenizer.eos_token == SPECIAL_TOKENS["eos_token"]


def test_four_models_compute_the_same_as_one_base(folder: Path) -> None:
    shared, separate = (run_metrics(folder, contender) for contender in ("native", "four-models"))
    assert len(shared) == len(separate) == 2, "two PPO epochs of one step on one rollout"
    for shared_metrics, separate_metrics in zip(shared, separate, strict=True):
        for name in COMPARED_METRICS:
            assert shared_metrics.get(name) == separate_metrics.get(name), name
    assert {*COMPARED_METRICS, "time/generation", "time/scoring"} <= shared[0].keys()
    assert shared[0]["val/completion_length"] <= 6 and shared[0]["policy/ratio"] == pytest.approx(1, abs=1e-5)


def test_copy_shared_needs_shared_weights() -> None:
    policy, role = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="shares no weights"):
        ppo_native.copy_shared_weights(role, policy)
    role.weight = policy.weight
    ppo_native.copy_shared_weights(role, policy)
    assert role.weight is not policy.weight and role.weight.equal(policy.weight)


def test_recipe_is_valid(folder: Path) -> None:
    recipes: list[Recipe] = []
    work = json.loads((folder / "work.json").read_text())
    sections = ppo_native.recipe_sections(folder, work, "native-nf4")
    run_recipe(folder, "ppo", [{"prompt": "w1"}], sections, bfloat16=False, name="x", runner=recipes.append)
    assert recipes[0].settings.model.quantization == "nf4"
    assert load_recipe(str(folder / "x.yaml"), stage="ppo").settings == recipes[0].settings


def test_split_seconds() -> None:
    """Two rollouts, 2 + 1 and 3 + 1 s of 20: updates take the other 13."""
    rollouts = [
        {"time/generation": 2.0, "time/scoring": 1.0},
        {"time/generation": 3.0, "time/scoring": 1.0},
    ]
    assert ppo_native.split_seconds(rollouts, 20.0) == {"generation": 5.0, "scoring": 2.0, "updates": 13.0}


def measured(contender: str, repeat: int, seconds: float) -> dict[str, Any]:
    split = {"generation": seconds / 4, "scoring": seconds / 4, "updates": seconds / 2}
    values = {"peak_memory_gib": seconds / 10, "episodes": 24, "rollouts": 3, "split": split}
    return {"contender": contender, "repeat": repeat, "seconds": seconds, **values}


def test_summary_ratios_are_within_a_repeat() -> None:
    """8 s and 24 s, then on a machine that is twice as slow 16 s and 48 s: 3 times."""
    runs = [
        measured("native", 0, 8),
        measured("trl", 0, 24),
        measured("trl", 1, 48),
        measured("native", 1, 16),
    ]
    summary = ppo.summarize(runs, ("native", "trl"))
    assert summary["times_slower_than_native"] == {"trl": 3.0}
    assert summary["episodes_per_second"] == {
        "native": (24 / 8 + 24 / 16) / 2,
        "trl": (24 / 24 + 24 / 48) / 2,
    }
    assert summary["native_seconds"] == {"generation": 3.0, "scoring": 3.0, "updates": 6.0}


def test_unequal_work_is_refused() -> None:
    work = {"episodes": 24, "rollout": 8, "new_tokens": 64}
    ppo.check_equal_work([measured("trl", 0, 1.0)], work)
    with pytest.raises(AssertionError, match="native: 60 tokens per episode"):
        ppo.check_equal_work([measured("native", 0, 1.0) | {"new_tokens": 60}], work)
    with pytest.raises(AssertionError, match="trl: 16 episodes"):
        ppo.check_equal_work([measured("trl", 0, 1.0) | {"episodes": 16}], work)
