"""Runs of seconds on a model of twelve words, and what the findings of a run complain about, as numbers."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.recipe.recipe import read_recipe
from finetune.training.result import Result
from finetune.training.stage import run_stage

WORDS = "abcdefgh"
REWARDS = '''\
def early(prompt, completion):
    """Many letters of the first half of the eight, and few of the second."""
    words = completion.split()
    return sum(1 if word in "abcd" else -1 for word in words)


def long(prompt, completion):
    return float(len(completion.split()))


def short(prompt, completion):
    return -float(len(completion.split()))


def constant(prompt, completion):
    return 1.0


def coarse(prompt, completion):
    return float(completion.split()[:2] == ["a", "b"])


def finer(prompt, completion):
    return sum(word == expected for word, expected in zip(completion.split(), "ab"))


def only_a(prompt, completion):
    return float(completion.split().count("a"))


def rare(prompt, completion):
    """The word that the base writes least often."""
    return float(completion.split().count("b"))


def variety(prompt, completion):
    return len(set(completion.split())) / 8
'''
RECIPES = {
    "sft": "",
    "dpo": "",
    "reward": "",
    "ppo": "rewards: {{sources: '{rewards}:early'}}\nsampling: {{max_new_tokens: 12}}\n"
    "ppo: {{rollout_size: 32, ppo_epochs: 2, kl_coef: 0.05, missing_eos_reward: null}}\n",
    "rejection": "rewards: {{sources: '{rewards}:early'}}\nsampling: {{max_new_tokens: 12}}\n"
    "rejection: {{rounds: 1, prompts: 16, num_generations: 2, keep: best_of_n, truncated: train}}\n",
    "grpo": "rewards: {{sources: '{rewards}:early'}}\nsampling: {{max_new_tokens: 6, num_generations: 4}}\n",
}
LORA = "{method: lora, rank: 8, dropout: 0.0}"
FULL = "{method: full}"
COMMON = """\
stage: {stage}
model: {{base: '{base}', precision: float32}}
data: {{source: '{rows}', held_out: 24, template: plain, max_length: {max_length}, cache: false}}
adapter: {adapter}
train: {{max_steps: 30, batch_size: 16, micro_batch_size: 16, learning_rate: 1e-2, checkpoint_every: 1000,
  lr_schedule: constant, warmup: 0, log_every: 1}}
evaluate: {{samples: 8, max_new_tokens: 24}}
"""


def make_base(folder: Path) -> Path:
    """Return a folder with a random model of eight words."""
    tokens = ["<s>", "</s>", "<pad>", "<unk>", *WORDS]
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(tokens), max_position_embeddings=96, initializer_range=0.2)
    config.bos_token_id, config.eos_token_id = 0, 1
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _words(rng: random.Random, length: int, letters: str = WORDS) -> str:
    return " ".join(rng.choice(letters) for _ in range(length))


def sft_rows(number: int, *, seed: int = 0, reply: int = 4) -> list[dict[str, Any]]:
    """Return rows with random replies: nothing about them can be generalized but the letters' frequency."""
    rng = random.Random(seed)
    return [{"prompt": _words(rng, 4), "completion": _words(rng, reply)} for _ in range(number)]


def pair_rows(
    number: int,
    *,
    seed: int = 0,
    letters: tuple[str, str] = ("abcd", "efgh"),
    exchanged: bool = False,
    lengths: tuple[int, int] = (4, 4),
) -> list[dict[str, Any]]:
    """Return pairs: chosen and rejected replies of some letters, exchanged on request."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        pair = [_words(rng, length, part) for length, part in zip(lengths, letters, strict=True)]
        chosen, rejected = reversed(pair) if exchanged else pair
        rows.append({"prompt": _words(rng, 4), "chosen": chosen, "rejected": rejected})
    return rows


def prompt_rows(number: int, *, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"prompt": _words(rng, 4)} for _ in range(number)]


ROWS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "sft": sft_rows,
    "dpo": pair_rows,
    "reward": pair_rows,
    **dict.fromkeys(("ppo", "rejection", "grpo"), prompt_rows),
}


@dataclass
class Workshop:
    """Makes runs in a folder; a run that several cases share is made once."""

    folder: Path
    runs: dict[str, Result] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        make_base(self.folder / "base")
        (self.folder / "rewards.py").write_text(REWARDS)

    def run(self, stage: str, settings: Mapping[str, Any]) -> Result:
        """Return the finished run of a stage with settings; ``rows`` are arguments of its rows."""
        key = json.dumps([stage, settings], sort_keys=True)
        if key not in self.runs:
            self.runs[key] = self._run(stage, dict(settings), f"run-{next(self.numbers)}")
        return self.runs[key]

    def _run(self, stage: str, settings: dict[str, Any], name: str) -> Result:
        rows = self._rows_file(stage, name, settings.pop("rows", {}))
        if "held_out_rows" in settings:
            settings["data.held_out"] = self._rows_file(stage, f"{name}-held", settings.pop("held_out_rows"))
        if "from" in settings:
            parent_stage, parent_settings = settings.pop("from")
            settings["model.init_from"] = str(self.run(parent_stage, parent_settings).directory)
        text = (COMMON + RECIPES[stage]).format(
            stage=stage,
            base=self.folder / "base",
            rows=rows,
            rewards=self.folder / "rewards.py",
            max_length=64 if stage in ("sft", "dpo", "reward") else "null",
            adapter=settings.pop("adapter", LORA),
        )
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(text)
        given = {key: self._with_paths(value) for key, value in settings.items()}
        out = self.folder / name
        return run_stage(
            read_recipe(stage, str(recipe), shortcuts=given, out=out), Console(quiet=True), command="a test"
        )

    def _rows_file(self, stage: str, name: str, arguments: Mapping[str, Any]) -> str:
        file = self.folder / f"{name}.jsonl"
        rows = ROWS[stage](**{"number": 72, **arguments})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    def _with_paths(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._with_paths(item) for key, item in value.items()}
        return value.replace("REWARDS", str(self.folder / "rewards.py")) if isinstance(value, str) else value
