"""A run on a mixture resumes from a checkpoint with the same rows, bit for bit."""

import json
import shutil
from pathlib import Path

from align import load_recipe, run
from finetune.training import checkpoints

RECIPE = """\
stage: sft
model: {{base: {base}, precision: float32}}
data:
  mix:
    - {{source: {rows}, weight: 3}}
    - {{source: {other}, weight: 1, select: {{min_reply_characters: 2}}}}
  epoch_rows: 100
  held_out: 4
  max_length: 128
adapter: {{method: lora, rank: 4, dropout: 0.1}}
train:
  max_steps: 8
  batch_size: 8
  micro_batch_size: 4
  learning_rate: 1e-2
  checkpoint_every: 2
  keep_checkpoints: 9
evaluate: {{samples: 0}}
"""


def test_pain_05_a_resumed_mixture_is_the_uninterrupted_one(
    tmp_path: Path, base_folder: Path, rows_file: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(60)))
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(RECIPE.format(base=base_folder, rows=rows_file, other=other))
    uninterrupted = run(load_recipe(str(recipe), out=tmp_path / "whole"))

    stopped = tmp_path / "stopped"
    shutil.copytree(uninterrupted.directory, stopped)
    shutil.rmtree(stopped / "adapter")
    checkpoints.remove_newer_than(stopped / "checkpoints", 4)
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(record | {"status": "running", "files": {}}))
    resumed = run(load_recipe(str(recipe), out=stopped))

    assert resumed.record["files"] == uninterrupted.record["files"] != {}
    assert [entry["loss"] for entry in resumed_metrics(stopped)] == [
        entry["loss"] for entry in resumed_metrics(tmp_path / "whole")
    ]
    rows = [source["rows"] for source in resumed.record["data"]["sources"]]
    assert rows == [75, 25] == [source["rows"] for source in uninterrupted.record["data"]["sources"]]


def resumed_metrics(folder: Path) -> list[dict[str, float]]:
    entries = [json.loads(entry) for entry in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]
