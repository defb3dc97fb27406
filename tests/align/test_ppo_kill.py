"""kill -9 during PPO: the resumed adapter is bit-identical."""

import json
from pathlib import Path

import pytest
from killed import STEPS, killed_twice, uninterrupted

RECIPE = """\
stage: ppo
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 4}}
adapter: {{method: {method}}}
train: {{max_steps: {steps}, batch_size: 4, micro_batch_size: 3, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 2, max_new_tokens: 4}}
rewards: {{sources: "{judges}:long"}}
sampling: {{max_new_tokens: 5}}
ppo:
  {{rollout_size: 8, ppo_epochs: 2, adaptive_kl_target: 0.5, kl_horizon: 64, normalize_rewards: running,
    target_kl: 0.05}}
pretraining: {{source: {answers}, weight: 0.5, batch_size: 3}}
"""


def written(folder: Path, name: str, rows: list[dict[str, str]]) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "judges.py").write_text("def long(prompt, completion):\n    return len(completion) / 10\n")
    rows = written(folder, "prompts.jsonl", [{"prompt": f"Add the numbers. {i} {i % 7}"} for i in range(20)])
    answers = [{"instruction": f"Add {i} 1.", "input": "", "output": str(i + 1)} for i in range(12)]
    given = {"base": base_folder, "rows": rows, "judges": folder / "judges.py", "steps": STEPS}
    given |= {"answers": written(folder, "answers.jsonl", answers)}
    paths = {}
    for method in ("lora", "adalora"):
        paths[method] = folder / f"{method}.yaml"
        paths[method].write_text(RECIPE.format(**given, method=method))
    return paths


def test_pain_06_ppo_resumes_after_kill_bit_for_bit(recipes: dict[str, Path], tmp_path: Path) -> None:
    expected = uninterrupted(recipes["lora"], tmp_path / "whole")
    assert killed_twice(recipes["lora"], tmp_path / "run", seed=0) == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_ppo_resumes_at_more_moments(recipes: dict[str, Path], tmp_path: Path, method: str) -> None:
    expected = uninterrupted(recipes[method], tmp_path / "whole")
    for seed in range(1, 6):
        assert killed_twice(recipes[method], tmp_path / f"run-{seed}", seed=seed) == expected
