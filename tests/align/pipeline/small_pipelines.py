"""Small recipes of three stages, a pipeline of them, and readers of its folder."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

RECIPES = {
    "sft": "data: {{source: {sums}, held_out: 6, max_length: 128, template: alpaca}}\n",
    "reward": "data: {{source: {pairs}, held_out: 6, max_length: 128, template: alpaca}}\n",
    "dpo": "data: {{source: {pairs}, held_out: 6, max_length: 128}}\n",
}
COMMON = """\
description: small
model: {{base: {base}, precision: float32}}
adapter: {{method: lora, rank: 2}}
train: {{max_steps: 4, batch_size: 8, learning_rate: 1e-2, checkpoint_every: 1}}
evaluate: {{samples: 2, max_new_tokens: 4}}
"""
PIPELINE = """\
description: three small stages
stages:
  sft: {recipe: sft/small}
  taste: {recipe: reward/small, from: sft}
  dpo: {recipe: dpo/small, from: sft, set: {train.max_steps: 3}}
"""
RLHF = """\
description: small
stages:
  sft: {recipe: sft/small}
  taste: {recipe: reward/small}
  ppo: {recipe: ppo/small, from: sft, reward: taste}
"""
PPO = """\
data: {{source: asked.jsonl, held_out: 4}}
sampling: {{max_new_tokens: 4}}
ppo: {{rollout_size: 8, ppo_epochs: 2, missing_eos_reward: null}}
"""
Call = Callable[..., tuple[int, str, str]]


def write_recipes(folder: Path, base: Path, sums: Path) -> None:
    pairs = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"Add the numbers. {i} {i % 7}", "chosen": f"{i + i % 7}", "rejected": f"numbers {i + 9}"}
        for i in range(48)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage, data in RECIPES.items():
        path = folder / "recipes" / stage / "small.yaml"
        path.parent.mkdir(parents=True)
        path.write_text((COMMON + data).format(base=base, sums=sums, pairs=pairs.name))
    path = folder / "recipes" / "pipelines" / "three.yaml"
    path.parent.mkdir()
    path.write_text(PIPELINE)


def write_rlhf(folder: Path, base: Path) -> None:
    """Add a pipeline that ends with PPO to the recipes of ``write_recipes``."""
    prompts = [json.dumps({"prompt": f"Add the numbers. {i} {i % 7}"}) for i in range(20)]
    (folder / "asked.jsonl").write_text("\n".join(prompts))
    (folder / "recipes" / "ppo").mkdir()
    (folder / "recipes" / "ppo" / "small.yaml").write_text((COMMON + PPO).format(base=base))
    (folder / "recipes" / "pipelines" / "rlhf.yaml").write_text(RLHF)


COMMAND = [sys.executable, "-m", "align", "run", "three"]


def record(folder: Path) -> dict:
    """Return pipeline.json of the only pipeline that has run in a folder."""
    (file,) = folder.glob("runs/*/pipeline.json")
    return json.loads(file.read_text())


def weights(folder: Path) -> dict[str, dict[str, str]]:
    """Return the checksums of what each stage has trained."""
    return {name: stage["files"] for name, stage in record(folder)["stages"].items()}
