"""Shared work of `benchmarks.ppo`: a randomly initialized base, prompts, a reward model.

The tokenizer is word-level, so that prompts have exactly the requested length, and so that a random model's
completions are text that a reward model tokenizes to the same length.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align import load_recipe, run
from benchmarks.common import BENCHMARK_VOCAB_SIZE
from finetune.recipe.recipe import Recipe

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# One id is the line feed's.
NUM_WORDS = BENCHMARK_VOCAB_SIZE - len(SPECIAL_TOKENS) - 1
NUM_PAIRS = 8
"""For the one training step of the reward model."""
WORK_SIZES = {"rollout": 8, "prompt": 96, "new_tokens": 64, "learning_rate": 3e-6}
"""The learning rate is arXiv 2403.17031's, as most of TRL's defaults are."""


@dataclass(frozen=True, slots=True)
class BaseShape:
    """A Llama shape with eight heads; ``intermediate_size`` is the width of its MLPs."""

    hidden_size: int
    layers: int
    intermediate_size: int


def prepare_work(
    folder: Path, shape: BaseShape, *, bfloat16: bool, rollouts: int = 3, epochs: int = 4
) -> dict[str, Any]:
    """Write base, prompts, a reward run and ``work.json`` into a folder, and return the latter's content.

    Args:
        folder: the target.
        shape: the base's.
        bfloat16: instead of float32.
        rollouts: of the run.
        epochs: PPO epochs per rollout.
    """
    base = folder / "model"
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=BENCHMARK_VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    episodes = rollouts * WORK_SIZES["rollout"]
    prompts = torch.randint(NUM_WORDS, (episodes, WORK_SIZES["prompt"]))
    work = {
        **WORK_SIZES,
        "episodes": episodes,
        "epochs": epochs,
        "bfloat16": bfloat16,
        "special_tokens": SPECIAL_TOKENS,
        "prompts": prompts.tolist(),
    }
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    make_reward_run(folder, bfloat16=bfloat16)
    return work


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of w0, w1, ..., independent of context."""
    vocabulary = {f"w{number}": number for number in range(NUM_WORDS)}
    for token in ("\n", *SPECIAL_TOKENS.values()):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    # Words and line feeds are tokens and spaces are not, so that the text of `as_text` gets its ids back.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\S+"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def as_text(ids: list[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def make_reward_run(folder: Path, *, bfloat16: bool) -> None:
    """Train a reward model for one step, into ``runs/reward``."""
    words = torch.randint(NUM_WORDS, (NUM_PAIRS, 3, 16)).tolist()
    rows = [dict(zip(("prompt", "chosen", "rejected"), map(as_text, row), strict=True)) for row in words]
    sections = {"train": {"max_steps": 1, "batch_size": NUM_PAIRS}, "evaluate": {"samples": 0}}
    run_recipe(folder, "reward", rows, sections, bfloat16=bfloat16)


def run_recipe(
    folder: Path,
    stage: str,
    rows: list[dict[str, str]],
    sections: dict[str, dict[str, Any]],
    *,
    bfloat16: bool,
    name: str = "",
    runner: Callable[[Recipe], object] = run,
) -> Path:
    """Write a recipe for the folder's base and run it as a user would.

    Args:
        folder: written by ``prepare_work``.
        stage: of llm-align.
        rows: its data.
        sections: the recipe's sections besides base, data and LoRA on all linear layers.
        bfloat16: instead of float32.
        name: of the recipe and the run; default: the stage's.
        runner: runs the recipe.

    Returns:
        The run's directory.
    """
    name = name or stage
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    model = {"base": str(folder / "model"), "precision": "bfloat16" if bfloat16 else "float32"}
    content: dict[str, Any] = {
        "stage": stage,
        "description": "one of a benchmark",
        "data": {"source": str(data), "template": "plain", "cache": False},
        "adapter": {"method": "lora", "rank": 16, "alpha": 32, "dropout": 0.0, "target": "all-linear"},
        **sections,
        "model": model | sections.get("model", {}),
    }
    file = folder / f"{name}.yaml"  # JSON is YAML
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    runner(load_recipe(str(file), stage=stage, out=folder / "runs" / name))
    return folder / "runs" / name
