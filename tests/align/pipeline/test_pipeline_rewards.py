"""Pipelines with stages that learn from rewards: which runs they get, and what does not fit."""

import json
from pathlib import Path

import pytest
from small_pipelines import Call, record

from align import load_pipeline
from finetune.recipe.errors import UserError

PPO = """\
description: small
model: {init_from: sft/small}
data: {source: prompts.jsonl, held_out: 4}
train: {max_steps: 2, batch_size: 4, learning_rate: 1e-3, evaluate_every: 2}
evaluate: {samples: 2}
rewards: {sources: [{run: reward/small}]}
sampling: {max_new_tokens: 4}
ppo: {rollout_size: 8, ppo_epochs: 1}
"""
WHOLE = """\
stages:
  sft: {recipe: sft/small}
  reward: {recipe: reward/small}
  ppo: {recipe: ppo/small, from: sft, reward: reward}
"""
TWO = """\
stages:
  sft: {recipe: sft/small}
  helpfulness: {recipe: reward/small, from: sft}
  safety: {recipe: reward/small, from: sft, set: {train.seed: 1}}
  ppo:
    recipe: ppo/small
    from: sft
    reward: [helpfulness, safety]
    set: {rewards.combine: llama2}
"""


@pytest.fixture
def place(here: Path) -> Path:
    (here / "recipes" / "ppo").mkdir()
    (here / "recipes" / "ppo" / "small.yaml").write_text(PPO)
    rows = [{"prompt": f"Add the numbers. {i} {i % 7}"} for i in range(100, 130)]
    (here / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return here


def told(place: Path, text: str) -> str:
    (place / "own.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load_pipeline("own.yaml")
    return str(refused.value)


def test_a_standalone_ppo_run_is_reused(call: Call, place: Path) -> None:
    status, _, err = call("ppo", "small")
    assert status == 0, err
    run_names = sorted(path.name for path in (place / "runs").iterdir())
    assert [name.split("-")[0] for name in run_names] == ["ppo", "reward", "sft"]
    (place / "own.yaml").write_text(WHOLE)
    status, out, _ = call("run", "own.yaml")
    assert status == 0 and out.count("already finished: runs/") == 3
    assert sorted(Path(stage["run"]).name for stage in record(place)["stages"].values()) == run_names
    page = next(place.glob("runs/own-*/report.html")).read_text()
    assert "rewards: reward" in page and "held-out reward" in page


def test_two_rewards_are_named_by_their_stages(call: Call, place: Path) -> None:
    (place / "own.yaml").write_text(TWO)
    status, out, err = call("run", "own.yaml")
    assert status == 0, err
    stages = record(place)["stages"]
    assert stages["helpfulness"]["digest"] != stages["safety"]["digest"]
    text = (place / stages["ppo"]["run"] / "recipe.yaml").read_text()
    for name in ("helpfulness", "safety"):
        assert f"run: {stages[name]['run']}" in text and f"name: {name}" in text
    samples = [json.loads(sample) for sample in next(place.glob("runs/own-*/samples.jsonl")).open()]
    assert [list(sample["rewards"]) for sample in samples] == [["helpfulness", "safety"]] * 2
    assert [list(sample["replies"]) for sample in samples] == [["sft", "ppo"]] * 2
    command = json.loads((place / stages["ppo"]["run"] / "run.json").read_text())["command"]
    assert command.startswith(f"llm-align ppo small --from {stages['sft']['run']} 'rewards.sources=[")


def test_invalid_rewards_are_reported_before_anything_runs(place: Path) -> None:
    error = told(place, WHOLE.replace("reward: reward}", "reward: sft}"))
    assert "stages.ppo.reward (own.yaml:4): 'sft' is not a reward model" in error
    error = told(place, TWO.replace("safety]", "safety, safety]"))
    assert "stages.ppo.reward (own.yaml:8): duplicate stages" in error
    error = told(place, TWO.replace("safety", "harm"))
    assert "stage ppo: rewards.combine (own.yaml:9): llama2 with harm, helpfulness" in error
    other = WHOLE.replace("reward/small}", "reward/small, set: {model.base: tiny}}")
    error = told(place, other)
    assert "stage ppo: rewards.sources[0].run (own.yaml:4): 'reward' is on base 'tiny'" in error
    other = WHOLE.replace("reward/small}", "reward/small, set: {data.template: vicuna}}")
    assert "'reward' has template 'vicuna', the policy has 'alpaca'" in told(place, other)
    both = WHOLE.replace("reward: reward}", "reward: reward, set: {rewards.sources: reward/small}}")
    assert "stages.ppo.reward (own.yaml:4): conflicts with rewards.sources" in told(place, both)
    assert not (place / "runs").exists()


def test_a_reward_on_the_base_does_not_fit_a_fully_finetuned_policy(place: Path) -> None:
    text = WHOLE.replace("sft/small}", "sft/small, set: {adapter: {method: full}}}")
    path = place / "recipes" / "sft" / "small.yaml"
    path.write_text(path.read_text().replace("adapter: {method: lora, rank: 2}\n", ""))
    error = told(place, text)
    assert (
        "stage ppo: reward (own.yaml:4): 'reward' is based on " in error
        and "this stage on stage sft" in error
    )
    pipeline_file = place / "own.yaml"
    pipeline_file.write_text(text.replace("reward/small}", "reward/small, from: sft}"))
    assert list(load_pipeline("own.yaml").recipes) == ["sft", "reward", "ppo"]
