"""Shared pieces of the benchmarks: a model of 42M parameters, its tokenizer, peak memory, ratios."""

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.distributed.hardware import detect_hardware, peak_memory_bytes

RESULTS_DIR = Path(__file__).parent / "results"
BENCHMARK_VOCAB_SIZE = 32_000
LEARNING_RATE = 1e-3


def train_bpe_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most 32k entries, trained on the data."""
    # Byte-level: no text of any data set becomes <unk>.
    bpe = ByteLevelBPETokenizer()
    # Three special tokens are added below.
    bpe.train_from_iterator(texts, vocab_size=BENCHMARK_VOCAB_SIZE - 3, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    return tokenizer


def adapted_llama(
    *, bfloat16: bool, hidden_size: int = 512, layers: int = 8, positions: int = 1024
) -> nn.Module:
    """Return a randomly initialized Llama with LoRA r = 16 on all linear layers."""
    # All contenders start from the same weights.
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BENCHMARK_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=1376 * hidden_size // 512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=positions,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16 if bfloat16 else torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(base, lora)
    return adapted


def shared_engine_arguments(
    folder: str, *, batch_size: int, max_steps: int, bfloat16: bool
) -> dict[str, Any]:
    """Return the TrainingArguments that all contenders share."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": LEARNING_RATE,
        # Every step's loss: the contenders' first losses are compared.
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
    }


def summarize_losses(history: Iterable[dict[str, float]]) -> dict[str, Any]:
    """Return the first two losses that a trainer logged, and the mean of all."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {"first_losses": losses[:2], "mean_loss": statistics.fmean(losses)}


def reset_peak_memory() -> None:
    """Reset the peak memory of the process (Linux), and of the GPU."""
    # Writing 5 resets VmHWM, the peak resident size (proc(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """Return the peak memory in GiB since the reset: allocated on the GPU, or resident (Linux)."""
    if torch.cuda.is_available():
        return peak_memory_bytes(detect_hardware()) / 2**30
    status_text = Path("/proc/self/status").read_text(encoding="ascii")
    peak_line = next(peak_line for peak_line in status_text.splitlines() if peak_line.startswith("VmHWM"))
    # The kernel reports KiB.
    return int(peak_line.split()[1]) / 2**20


def peak_memory_in_subprocess(module: str, arguments: Sequence[str], contender: str) -> float:
    """Return the peak memory in GiB of a fresh process that trains a few steps of one contender."""
    # A fresh process, since a peak includes whatever ran before it.
    command = [sys.executable, "-m", module, *arguments, "--only", contender]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak_gib: float = json.loads(printed.splitlines()[-1])["peak_memory_gib"]
    return peak_gib


def times_slower(runs: Sequence[dict[str, Any]], contenders: Sequence[str]) -> dict[str, float]:
    """Return each contender's time over the first contender's, as the median over the repeats."""
    first, *others = contenders
    ours = {entry["repeat"]: entry["seconds"] for entry in runs if entry["contender"] == first}
    return {
        # Ratios within a repeat: a machine that slows down hits all contenders of it.
        contender: statistics.median(
            entry["seconds"] / ours[entry["repeat"]] for entry in runs if entry["contender"] == contender
        )
        for contender in others
    }


def environment_metadata(*, bfloat16: bool) -> dict[str, Any]:
    """Return date, device and versions of a measurement."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": detect_hardware().name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precision": "bfloat16" if bfloat16 else "float32",
    }


def save_result(name: str, result: dict[str, Any]) -> Path:
    """Write a result to ``results/NAME-PRECISION-DATE.json`` and print the path."""
    path = RESULTS_DIR / f"{name}-{result['precision']}-{result['date'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(f"written to {path}")
    return path
