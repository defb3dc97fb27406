"""Cells of the compatibility matrix as commands: a random model, a few rows, three steps, two processes."""

import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import warm

from finetune.distributed.solver import Combination

PREFERENCE_STAGES = ("reward", "dpo", "kto", "chain_of_hindsight")
GENERATING_STAGES = ("ppo", "rejection", "rloo", "grpo")
REWARD = "def short(prompt, completion):\n    return -0.1 * len(completion)\n"
STAGE_SECTIONS = {
    "ppo": "sampling: {max_new_tokens: 4}\nppo: {rollout_size: 8, ppo_epochs: 1, missing_eos_reward: null}\n",
    "rloo": "sampling: {num_generations: 4, max_new_tokens: 4}\n",
    "grpo": "sampling: {num_generations: 4, max_new_tokens: 4}\n",
    "rejection": "sampling: {max_new_tokens: 4}\n"
    "rejection: {rounds: 1, prompts: 8, num_generations: 2, keep: best_of_n, truncated: train}\n",
}
SMALL_ADAPTER_SETTINGS = {"vera": "rank: 8", "oft": "block_size: 8", "multitask_prompt": "virtual_tokens: 8"}
SMALL_ADAPTER_SETTINGS["trainable_tokens"] = f"tokens: {list(range(20, 60))}"
"""Settings of adapters whose defaults are for larger models."""
TEMPLATES = {"rloo": "plain", "grpo": "plain", "chain_of_hindsight": "vicuna"}
TIMEOUT_SECONDS, SHOWN = 240, 6000


@dataclass(frozen=True)
class CellFiles:
    """Files that cells run on: a base, and data of each kind."""

    folder: Path

    @property
    def base(self) -> Path:
        """Return the folder of the random base."""
        return self.folder / "base"

    def rows(self, stage: str) -> Path:
        """Return the data file of a stage."""
        kind = "pairs" if stage in PREFERENCE_STAGES else "prompts" if stage in GENERATING_STAGES else "sums"
        return self.folder / f"{kind}.jsonl"


def make_cell_files(folder: Path) -> CellFiles:
    """Write a random Llama of two layers, biases in its attention, and 24 rows of each kind."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    files = CellFiles(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["### Instruction: ### Input: ### Response: Add the numbers."] * 4, vocab_size=400
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.save_pretrained(files.base)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special_ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=512,
        attention_bias=True,
        num_key_value_heads=4,
        max_position_embeddings=512,
        **sizes,
        **special_ids,
    )
    LlamaForCausalLM(config).save_pretrained(files.base)
    sums = [
        {"instruction": "Add the numbers.", "input": f"{i} {i % 7}", "output": f"{i + i % 7}"}
        for i in range(24)
    ]
    pairs = [
        {"prompt": f"Add {i} {i % 7}", "chosen": f"{i + i % 7}", "rejected": f"no {i}"} for i in range(24)
    ]
    for name, rows in {"sums": sums, "pairs": pairs, "prompts": pairs}.items():
        jsonl = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(jsonl, encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return files


def recipe_text(cell: Combination, files: CellFiles) -> str:
    """Return the recipe of a cell."""
    adapter = ", ".join(
        filter(None, [f"method: {cell.adapter}", SMALL_ADAPTER_SETTINGS.get(cell.adapter, "")])
    )
    template = TEMPLATES.get(cell.stage, "alpaca")
    lines = [
        f"stage: {cell.stage}",
        f"model: {{base: {files.base}, precision: float32, quantization: {cell.quantization}}}",
        f"data: {{source: {files.rows(cell.stage)}, template: {template}, cache: false, held_out: 4}}",
        f"adapter: {{{adapter}}}",
        "train: {max_steps: 3, batch_size: 8, micro_batch_size: 2, warmup: 0,"
        f" engine: {cell.engine}, optimizer: {cell.optimizer},"
        f" strategy: {cell.strategy}, num_processes: {cell.processes}, offload: {cell.offload}}}",
        "evaluate: {samples: 1, max_new_tokens: 3}" if cell.stage != "reward" else "",
        f'rewards: {{sources: "{files.folder}/reward.py:short"}}' if cell.stage in GENERATING_STAGES else "",
        STAGE_SECTIONS.get(cell.stage, ""),
    ]
    return "\n".join(line for line in lines if line)


def cell_name(cell: Combination) -> str:
    """Return a cell's name."""
    parts = [cell.stage, cell.adapter, cell.quantization, cell.strategy]
    options = [value for value in (cell.engine, cell.optimizer, cell.offload) if value not in DEFAULT_VALUES]
    return "-".join(parts + options)


DEFAULT_VALUES = ("native", "adamw", "none")


def cell_command(cell: Combination, files: CellFiles, out: Path) -> list[str]:
    """Write a cell's recipe next to ``out`` and return its command."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(recipe_text(cell, files), encoding="utf-8")
    return [sys.executable, "-m", "align", cell.stage, str(recipe), "--out", str(out)]


def run_cell(cell: Combination, files: CellFiles, out: Path) -> tuple[int, str]:
    """Run a cell; return its exit status and output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    completed = warm.run(
        cell_command(cell, files, out),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        env=environment,
    )
    return completed.returncode, completed.stdout + completed.stderr


def run_at_once(cell: Combination, world: CellFiles, out: Path) -> tuple[int, str]:
    """Run a cell as a launcher of the user's would, on processes that begin at once."""
    log, words = out.with_suffix(".log"), cell_command(cell, world, out)
    launcher = {"WORLD_SIZE": cell.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with log.open("wb") as file:
        processes = []
        for rank in range(cell.processes):
            places = launcher | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
            environment = os.environ | {name: str(value) for name, value in places.items()}
            processes.append(warm.Popen(words, env=environment, stdout=file, stderr=file))
    found = ended(processes)
    return next(
        (status for status in found if status > 0), next((s for s in found if s), 0)
    ), log.read_text()[-SHOWN:]


def ended(processes: list[warm.Popen]) -> list[int]:
    """Return exit statuses; where one process failed or time is up, the others are killed."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            end = min(end, time.monotonic() + 3)
        if time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [process.wait() for process in processes]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port
