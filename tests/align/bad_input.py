"""Ways to make a mistake: each function leaves it in a fresh folder and returns the command line.

The folder holds a good recipe (good.yaml), good rows (rows.jsonl) and a link to a good base (base).
"""

import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyarrow
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from finetune.recipe.runs import LOCK_FILE

RECIPE = """\
stage: sft
model: {base: base, precision: float32}
data: {source: rows.jsonl, held_out: 2, max_length: 128}
adapter: {method: lora, rank: 2}
train: {max_steps: 1, batch_size: 4}
evaluate: {samples: 0}
"""
ROWS = [{"instruction": f"Add {i} and {i}.", "input": "", "output": str(2 * i)} for i in range(8)]


@dataclass
class Place:
    """The folder of a test case."""

    root: Path
    base: Path
    locks: list[IO[bytes]] = field(default_factory=list)

    def rows(self, *rows: object, name: str = "bad.jsonl") -> list[str]:
        return self.data(name, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def data(self, name: str, content: bytes) -> list[str]:
        (self.root / name).write_bytes(content)
        return ["sft", "good.yaml", "--data", name]

    def recipe(self, old: str, new: str) -> list[str]:
        assert old in RECIPE
        (self.root / "bad.yaml").write_text(RECIPE.replace(old, new))
        return ["sft", "bad.yaml"]

    def copy_of_base(self) -> Path:
        return Path(shutil.copytree(self.base, self.root / "broken"))

    def file(self, name: str, content: str = "mine") -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def lock(self, name: str) -> None:
        """Hold a lock as a running process does, until the place is deleted."""
        self.file(name, "")
        self.locks.append((self.root / name).open("rb"))
        fcntl.flock(self.locks[-1], fcntl.LOCK_EX)


def words(*more: str) -> Callable[[Place], list[str]]:
    return lambda place: ["sft", "good.yaml", *more]


def line(*whole: str) -> Callable[[Place], list[str]]:
    return lambda place: list(whole)


def rows(*content: object, name: str = "bad.jsonl") -> Callable[[Place], list[str]]:
    return lambda place: place.rows(*content, name=name)


def data(name: str, content: bytes) -> Callable[[Place], list[str]]:
    return lambda place: place.data(name, content)


def recipe(old: str, new: str) -> Callable[[Place], list[str]]:
    return lambda place: place.recipe(old, new)


def a_parquet_file(place: Place) -> list[str]:
    parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), place.root / "bad.parquet")
    return ["sft", "good.yaml", "--data", "bad.parquet"]


def base_without(*files: str) -> Callable[[Place], list[str]]:
    def arrange(place: Place) -> list[str]:
        folder = place.copy_of_base()
        for pattern in files:
            for file in folder.glob(pattern):
                file.unlink()
        return ["sft", "good.yaml", "--base", "broken"]

    return arrange


def damaged_weights(place: Place) -> list[str]:
    weights = place.copy_of_base() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return ["sft", "good.yaml", "--base", "broken"]


def weights_of_zero_length(place: Place) -> list[str]:
    (place.copy_of_base() / "model.safetensors").write_bytes(b"")
    return ["sft", "good.yaml", "--base", "broken"]


def broken_config(content: str) -> Callable[[Place], list[str]]:
    def arrange(place: Place) -> list[str]:
        (place.copy_of_base() / "config.json").write_text(content)
        return ["sft", "good.yaml", "--base", "broken"]

    return arrange


def other_sizes(place: Place) -> list[str]:
    path = place.copy_of_base() / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 600}))
    return ["sft", "good.yaml", "--base", "broken"]


def weights_lack(place: Place) -> list[str]:
    path = place.copy_of_base() / "model.safetensors"
    remaining = {key: value for key, value in load_file(path).items() if ".layers.1." not in key}
    save_file(remaining, path, metadata={"format": "pt"})
    return ["sft", "good.yaml", "--base", "broken"]


def no_eos(place: Place) -> list[str]:
    folder = place.copy_of_base()
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["eos_token"]
    path.write_text(json.dumps(content))
    return ["sft", "good.yaml", "--base", "broken"]


def larger_tokenizer(place: Place) -> list[str]:
    folder = place.copy_of_base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*(f"word{index}" for index in range(600 - len(tokenizer))), "Add"])
    tokenizer.save_pretrained(folder)
    return ["sft", "good.yaml", "--base", "broken"]


def out_is_a_file(place: Place) -> list[str]:
    place.file("taken")
    return ["sft", "good.yaml", "--out", "taken"]


def out_below_a_file(place: Place) -> list[str]:
    place.file("taken")
    return ["sft", "good.yaml", "--out", "taken/run"]


def out_is_foreign(place: Place) -> list[str]:
    place.file("thesis/chapter.tex")
    return ["sft", "good.yaml", "--out", "thesis"]


def out_is_foreign_by_force(place: Place) -> list[str]:
    place.file("thesis/adapter/precious.txt")
    return ["sft", "good.yaml", "--out", "thesis", "--force"]


def other_run(place: Place) -> list[str]:
    record = {"format": 2, "status": "finished", "recipe": "dolly", "digest": "0123abcd"}
    place.file("theirs/run.json", json.dumps(record))
    return ["sft", "good.yaml", "--out", "theirs"]


def damaged_record(place: Place) -> list[str]:
    place.file("theirs/run.json", '{"status": "fini')
    return ["sft", "good.yaml", "--out", "theirs"]


def chat_with(status: str) -> Callable[[Place], list[str]]:
    def arrange(place: Place) -> list[str]:
        command = "llm-align sft good.yaml --out theirs"
        record = {"format": 2, "status": status, "recipe": "good", "digest": "0123abcd", "command": command}
        place.file("theirs/run.json", json.dumps(record))
        if status == "running":
            place.lock(f"theirs/{LOCK_FILE}")
        return ["chat", "theirs", "--prompt", "Hello"]

    return arrange


def all_rows_too_long(place: Place) -> list[str]:
    return [*place.rows({"instruction": "word " * 300, "output": "x"}), "data.held_out=0"]


def held_out_rows_too_long(place: Place) -> list[str]:
    place.rows({"instruction": "word " * 300, "output": "x"}, name="long.jsonl")
    return ["sft", "good.yaml", "data.held_out=long.jsonl"]
