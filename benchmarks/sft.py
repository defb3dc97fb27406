"""Supervised tuning, the native engine against TRL: the same rows, the same start, one process, in turn.

    make bench-sft ARGS=...      or      python -m benchmarks.sft --data gsm8k/train.jsonl

A Llama shape of 42M parameters with random weights and a vocabulary of 32k, LoRA r = 16 on all linear
layers, loss on the answers alone. Contenders: the native engine; TRL with its defaults; TRL at its best
here (batches grouped by length, no gradient checkpointing). Every repeat runs all of them, in turn forwards
and backwards. Seconds mean little on a shared machine, so the last line gives ratios: the median over the
repeats of a contender's time to ours. Peak memory comes from a process of its own for each contender.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig

from finetune.data.collate import PaddedCollator
from finetune.data.dataset import Prepared, TokenizedRows, prepare
from finetune.data.tokens import Encoder
from finetune.planning.hardware import detect
from finetune.recipe.settings import DataSettings
from finetune.training.trainer import NativeTrainer
from finetune.training.trl_engine import trl_trainer

RESULTS = Path(__file__).parent / "results"
EMBEDDED = "recipes/tiny/data/sft_train.jsonl"
CONTENDERS = ("native", "trl", "trl-best")
VOCABULARY = 32_000
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Work:
    """What every contender does."""

    data: Prepared
    encoder: Encoder
    model: nn.Module
    batch_size: int
    bfloat16: bool


def build(path: str, rows: int, batch_size: int, *, bfloat16: bool) -> Work:
    """Return rows, tokenizer and adapted model; the tokenizer is trained on the data's own text."""
    torch.manual_seed(0)
    text = Path(path).read_text(encoding="utf-8")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.splitlines(), vocab_size=VOCABULARY - 3)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    encoder = Encoder(tokenizer, "plain")
    settings = DataSettings(source=[json.loads(line) for line in text.splitlines()[:rows]], cache=False)
    data = prepare(settings, encoder, max_length=512, seed=0)
    return Work(data, encoder, _model(bfloat16), batch_size, bfloat16)


def run(work: Work, contender: str, *, max_steps: int = -1) -> dict[str, Any]:
    """Train one epoch with one contender, from the same start; return seconds, mean loss and tokens."""
    model = deepcopy(work.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(work, contender, model, folder, max_steps)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "contender": contender,
        "seconds": seconds,
        "first_losses": losses[:2],
        "mean_loss": statistics.fmean(losses),
    }


def _model(bfloat16: bool) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16 if bfloat16 else torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(base, lora)
    return adapted


def _trainer(work: Work, contender: str, model: nn.Module, folder: str, max_steps: int) -> Trainer:
    common: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": 1,
        "max_steps": max_steps,
        "per_device_train_batch_size": work.batch_size,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": work.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
    }
    rows: TokenizedRows = work.data.train
    if contender == "native":
        return NativeTrainer(
            model,
            TrainingArguments(**common, remove_unused_columns=False),
            train_rows=rows,
            held_out_rows=None,
            collator=PaddedCollator(work.encoder.stop_ids[0]),
            batch_size=work.batch_size,
            group_by_length=True,
        )
    best = {"train_sampling_strategy": "group_by_length", "activation_checkpointing": False}
    config = SFTConfig(**common, max_length=None, **(best if contender == "trl-best" else {}))
    return trl_trainer(model, config, work.encoder.tokenizer, train_rows=rows, held_out_rows=None)


def _peak() -> float:
    """Return this process's peak resident memory in GiB since it was reset (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def _peak_memory(arguments: list[str], contender: str) -> float:
    """Return the peak resident memory in GiB of a process that does a few steps of one contender."""
    command = [sys.executable, "-m", "benchmarks.sft", *arguments, "--only", contender]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak: float = json.loads(printed.splitlines()[-1])["peak_memory_gib"]
    return peak


@click.command()
@click.option(
    "--data", default=EMBEDDED, show_default=True, help="A .jsonl file in a layout that recipes know."
)
@click.option("--rows", default=128, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--bfloat16", is_flag=True, help="bfloat16 in place of float32, for all contenders.")
@click.option(
    "--only", type=click.Choice(CONTENDERS), help="Four steps of one contender, for its peak memory."
)
@click.option("--save", is_flag=True, help=f"Write the result to {RESULTS.name}/.")
def main(
    data: str, rows: int, batch_size: int, repeats: int, bfloat16: bool, only: str | None, save: bool
) -> None:
    """Measure, and print the ratios on the last line."""
    work = build(data, rows, batch_size, bfloat16=bfloat16)
    if only:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts anew from here
        run(work, only, max_steps=4)
        click.echo(json.dumps({"peak_memory_gib": round(_peak(), 3)}))
        return
    runs = []
    for repeat in range(repeats):
        for contender in CONTENDERS if repeat % 2 == 0 else reversed(CONTENDERS):
            runs.append({"repeat": repeat, **run(work, contender)})
            click.echo(json.dumps(runs[-1]))
    arguments = ["--data", data, "--rows", str(rows), "--batch-size", str(batch_size)]
    arguments += ["--bfloat16"] if bfloat16 else []
    peaks = {contender: _peak_memory(arguments, contender) for contender in CONTENDERS}
    result = _result(work, runs, peaks, {"data": Path(data).name, "rows": rows, "batch_size": batch_size})
    if save:
        name = f"sft-{result['precision']}-{result['date'][:10]}.json"
        (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    ratios = ", ".join(f"{name} {value:.2f}x" for name, value in result["times_slower_than_native"].items())
    click.echo(f"peak memory (GiB): {peaks}\ntime of others / native: {ratios}")


def _result(
    work: Work, runs: list[dict[str, Any]], peaks: dict[str, float], facts: dict[str, Any]
) -> dict[str, Any]:
    ours = {entry["repeat"]: entry["seconds"] for entry in runs if entry["contender"] == "native"}
    ratios = {
        contender: statistics.median(
            entry["seconds"] / ours[entry["repeat"]] for entry in runs if entry["contender"] == contender
        )
        for contender in CONTENDERS[1:]
    }
    tokens, trained = work.data.train.num_tokens, work.data.train.num_trained
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": detect().name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precision": "bfloat16" if work.bfloat16 else "float32",
        **facts,
        "tokens": tokens,
        "share_with_loss": trained / tokens,
        "times_slower_than_native": ratios,
        "peak_memory_gib": peaks,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
