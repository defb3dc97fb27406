"""Benchmark of SFT against TRL: the same rows and initial weights, contenders alternating in one process.

    make bench-sft ARGS=...      or      python -m benchmarks.sft --data gsm8k/train.jsonl

A randomly initialized Llama of 42M parameters with a vocabulary of 32k, LoRA r = 16 on all linear layers,
loss on assistant tokens alone. Contenders: the native engine; TRL with its defaults; TRL at its fastest
(batches grouped by length, no gradient checkpointing). Every repeat runs all of them, in alternating order.
Seconds mean little on a shared machine, so the last line gives ratios: the median over the repeats of a
contender's time to ours. Peak memory comes from one fresh process per contender.
"""

import json
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig

from benchmarks.common import (
    RESULTS_DIR,
    adapted_llama,
    environment_metadata,
    peak_memory_gib,
    peak_memory_in_subprocess,
    reset_peak_memory,
    save_result,
    shared_engine_arguments,
    summarize_losses,
    times_slower,
    train_bpe_tokenizer,
)
from finetune.data.collate import PaddedCollator
from finetune.data.dataset import PreparedData, TokenizedRows, prepare_conversations
from finetune.data.tokens import Encoder
from finetune.engines.trl.trainer import TrlSFTTrainer
from finetune.recipe.settings import DataSettings
from finetune.training.trainer import NativeTrainer, TrainerData

EMBEDDED_ROWS = "recipes/tiny/data/sft_train.jsonl"
CONTENDERS = ("native", "trl", "trl-best")


@dataclass(frozen=True)
class SftWork:
    """Data and model that all contenders share."""

    data: PreparedData
    encoder: Encoder
    model: nn.Module
    batch_size: int
    bfloat16: bool


def build_work(path: str, rows: int, batch_size: int, *, bfloat16: bool) -> SftWork:
    """Return rows, adapted model, and a tokenizer trained on the data."""
    text = Path(path).read_text(encoding="utf-8")
    tokenizer = train_bpe_tokenizer(text.splitlines())
    encoder = Encoder(tokenizer, "plain")
    settings = DataSettings(
        source=[json.loads(text_line) for text_line in text.splitlines()[:rows]], cache=False
    )
    data = prepare_conversations(settings, encoder, max_length=512, seed=0)
    return SftWork(data, encoder, adapted_llama(bfloat16=bfloat16), batch_size, bfloat16)


def run_contender(work: SftWork, contender: str, *, max_steps: int = -1) -> dict[str, Any]:
    """Train one epoch with one contender from the initial weights; return seconds and losses."""
    model = deepcopy(work.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _build_trainer(work, contender, model, folder, max_steps)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {"contender": contender, "seconds": seconds, **summarize_losses(trainer.state.log_history)}


def _build_trainer(work: SftWork, contender: str, model: nn.Module, folder: str, max_steps: int) -> Trainer:
    common = shared_engine_arguments(
        folder, batch_size=work.batch_size, max_steps=max_steps, bfloat16=work.bfloat16
    )
    rows: TokenizedRows = work.data.train
    if contender == "native":
        return NativeTrainer(
            model,
            TrainingArguments(**common, remove_unused_columns=False),
            # Padding is masked and has no loss, so any id will do.
            TrainerData(rows, None, PaddedCollator(work.encoder.stop_ids[0]), work.batch_size, True),
        )
    # The fastest settings of TRL here; defaults are measured as "trl".
    best = {"train_sampling_strategy": "group_by_length", "activation_checkpointing": False}
    config = SFTConfig(**common, max_length=None, **(best if contender == "trl-best" else {}))
    return TrlSFTTrainer(model, config, work.encoder.tokenizer, train=rows, held_out=None)


@click.command()
@click.option(
    "--data", default=EMBEDDED_ROWS, show_default=True, help="A .jsonl file in a layout that recipes support."
)
@click.option("--rows", default=128, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--bfloat16", is_flag=True, help="bfloat16 in place of float32, for all contenders.")
@click.option(
    "--only", type=click.Choice(CONTENDERS), help="Four steps of one contender, for its peak memory."
)
@click.option("--save", is_flag=True, help=f"Write the result to {RESULTS_DIR.name}/.")
def main(
    data: str, rows: int, batch_size: int, repeats: int, bfloat16: bool, only: str | None, save: bool
) -> None:
    """Measure, and print the ratios on the last line."""
    work = build_work(data, rows, batch_size, bfloat16=bfloat16)
    if only:
        reset_peak_memory()
        run_contender(work, only, max_steps=4)
        click.echo(json.dumps({"peak_memory_gib": round(peak_memory_gib(), 3)}))
        return
    runs = []
    for repeat in range(repeats):
        # Alternating order, so that a drift of the machine hits all contenders alike.
        for contender in CONTENDERS if repeat % 2 == 0 else reversed(CONTENDERS):
            runs.append({"repeat": repeat, **run_contender(work, contender)})
            click.echo(json.dumps(runs[-1]))
    arguments = ["--data", data, "--rows", str(rows), "--batch-size", str(batch_size)]
    arguments += ["--bfloat16"] if bfloat16 else []
    peaks = {
        contender: peak_memory_in_subprocess("benchmarks.sft", arguments, contender)
        for contender in CONTENDERS
    }
    result = _result(work, runs, peaks, {"data": Path(data).name, "rows": rows, "batch_size": batch_size})
    if save:
        save_result("sft", result)
    ratios = ", ".join(f"{name} {value:.2f}x" for name, value in result["times_slower_than_native"].items())
    click.echo(f"peak memory (GiB): {peaks}\ntime of others / native: {ratios}")


def _result(
    work: SftWork, runs: list[dict[str, Any]], peaks: dict[str, float], settings: dict[str, Any]
) -> dict[str, Any]:
    tokens, trained = work.data.train.num_tokens, work.data.train.num_trained
    return {
        **environment_metadata(bfloat16=work.bfloat16),
        **settings,
        "tokens": tokens,
        "share_with_loss": trained / tokens,
        "times_slower_than_native": times_slower(runs, CONTENDERS),
        "peak_memory_gib": peaks,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
