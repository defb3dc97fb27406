"""Benchmark of DPO against TRL: the same pairs and initial weights, contenders alternating in one process.

    make bench-dpo ARGS=...      or      python -m benchmarks.dpo --data hh_rlhf/harmless-base/train.jsonl.gz

A randomly initialized Llama of 42M parameters with a vocabulary of 32k, LoRA r = 16 on all linear layers; the
reference is the base (the adapter disabled). Contenders: one row per pair with a shared prompt; one row per
completion; TRL's DPOTrainer with its defaults; TRL's DPOTrainer at its fastest (pairs grouped by length, no
gradient checkpointing). Each computes the reference log-probabilities once for every pair, within its steps.
Before the timing, policy and reference log-probabilities of both implementations are compared. Seconds mean
little on a shared machine, so the last line gives ratios: the median over the repeats of a contender's time
to ours. Peak memory comes from one fresh process per contender.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer

from align.engines.trl.preference import to_pair_dataset
from align.preference.groups import Group, GroupCollator
from align.preference.logps import token_logps
from align.preference.losses.inputs import Pairs
from align.preference.losses.pairwise import dpo
from align.preference.rows.dataset import PreferenceGroups
from align.preference.rows.prepare import prepare_preferences
from align.preference.settings import PreferenceSettings
from benchmarks.common import (
    LEARNING_RATE,
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
from finetune.data.batches import MicroBatchSampler
from finetune.data.sources import read_source
from finetune.data.tokens import Encoder
from finetune.training.loss import output_head

EMBEDDED_PREFERENCES = "recipes/tiny/data/preferences_train.jsonl"
CONTENDERS = ("native", "native-separate", "trl", "trl-best")
COMPLETION_TOLERANCE = {False: 1e-5, True: 2e-2}
"""Tolerated relative difference of completion log-probabilities: float32; bfloat16, with its three digits."""


@dataclass(frozen=True)
class DpoWork:
    """Data and model that all contenders share."""

    groups: PreferenceGroups
    tokenizer: PreTrainedTokenizerFast
    model: PeftModel
    batch_size: int
    bfloat16: bool
    device: torch.device

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def group(self, index: int) -> Group:
        """Return a pair as the collator's input."""
        row = self.groups[index]
        sequences = (row.prompt_ids, *row.completion_ids)
        prompt, *completions = (torch.tensor(ids, dtype=torch.long) for ids in sequences)
        return Group(prompt, tuple(completions))

    def batches(self) -> Iterator[list[int]]:
        """Yield the pairs of each step, grouped by length as in the native trainers."""
        lengths = self.groups.lengths.tolist()
        size = self.batch_size
        yield from MicroBatchSampler(
            lengths, batch_size=size, micro_batch_size=size, seed=0, group_by_length=True
        )


def build_work(path: str, rows: int, batch_size: int, *, bfloat16: bool, small: bool = False) -> DpoWork:
    """Return the first pairs of a file, the adapted model, and a tokenizer trained on the file."""
    rows_of_file = [row.columns for row in read_source(path)]
    tokenizer = train_bpe_tokenizer(str(text) for row in rows_of_file for text in row.values())
    # More than needed, as preparation drops some pairs and `_first_groups` demands exactly `rows`.
    settings = PreferenceSettings(source=rows_of_file[: 2 * rows], cache=False, template="hh")
    prepared = prepare_preferences(settings, Encoder(tokenizer, "hh"), max_length=512, seed=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {"hidden_size": 64, "layers": 2} if small else {}
    model = adapted_llama(bfloat16=bfloat16, **shape)
    assert isinstance(model, PeftModel)
    groups = _first_groups(prepared.train, rows)
    return DpoWork(groups, tokenizer, model.to(device), batch_size, bfloat16, device)


def run_contender(work: DpoWork, contender: str, *, max_steps: int = -1) -> dict[str, Any]:
    """Train one epoch with one contender from the initial weights; return seconds and losses."""
    model = deepcopy(work.model)
    if contender.startswith("native"):
        measured = _run_native(work, model, separate=contender.endswith("separate"), max_steps=max_steps)
    else:
        measured = _run_trl(work, model, best=contender.endswith("best"), max_steps=max_steps)
    return {"contender": contender, **measured}


def logp_differences(work: DpoWork) -> dict[str, float]:
    """Return the largest relative differences of log-probabilities between our implementation and TRL's.

    LoRA's B is randomized first, since policy and reference agree as long as it is zero.
    """
    model = deepcopy(work.model)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        # With B = 0 policy and reference agree, and the comparison would prove nothing.
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trl_trainer(work, model, folder, best=True, max_steps=-1)
        columns = to_pair_dataset(work.groups)
        collated = trainer.data_collator([columns[index] for index in range(len(columns))])
        batch = {key: value.to(work.device) for key, value in collated.items()}
        theirs = {"policy": trainer.compute_ref_log_probs(model, batch)}  # by "ref", its copy of the adapter
        model.delete_adapter("ref")
        theirs["reference"] = trainer.compute_ref_log_probs(model, batch)
    with torch.no_grad():
        pairs = _pair_logps(work, model, range(len(work.groups)), GroupCollator(work.pad_id, budget=2048))
    assert pairs.reference_chosen_logps is not None and pairs.reference_rejected_logps is not None
    ours = {
        "policy": (pairs.chosen_logps, pairs.rejected_logps),
        "reference": (pairs.reference_chosen_logps, pairs.reference_rejected_logps),
    }
    mean_difference = (torch.cat(ours["policy"]) - torch.cat(ours["reference"])).abs().mean()
    assert mean_difference > 0.01, "policy and reference agree"
    return {role: _max_relative_difference(torch.cat(ours[role]), torch.cat(theirs[role])) for role in ours}


def _first_groups(groups: PreferenceGroups, count: int) -> PreferenceGroups:
    """Return the first groups."""
    assert len(groups) >= count, f"{len(groups)} pairs of {count}"
    # Sequences are stored prompt first, then its completions: `first` of them belong to `count` groups.
    first = int(groups.prompt_index[count])
    completions = first - count
    return PreferenceGroups(
        input_ids=groups.input_ids[: groups.offsets[first]],
        offsets=groups.offsets[: first + 1],
        prompt_index=groups.prompt_index[: count + 1],
        scores=groups.scores[:completions],
        ranks=groups.ranks[:completions],
        margins=groups.margins[:count],
        locations=groups.locations[:count],
        source_ids=groups.source_ids[:count],
    )


def _run_native(work: DpoWork, model: PeftModel, *, separate: bool, max_steps: int) -> dict[str, Any]:
    trained_weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained_weights, lr=LEARNING_RATE, weight_decay=0.0)
    batches = list(work.batches())[: max_steps if max_steps > 0 else None]
    # Linear decay to zero and, below, clipping at 1: defaults of TrainingArguments, which TRL's contenders
    # use.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    collate = GroupCollator(work.pad_id, one_per_row=separate)
    model.train()
    start, losses = time.perf_counter(), []
    for rows in batches:
        with torch.autocast(work.device.type, torch.bfloat16, enabled=work.bfloat16):
            loss = dpo(_pair_logps(work, model, rows, collate)).losses.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained_weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        # item() waits for the GPU, so that the clock includes all of its work.
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "first_losses": losses[:2], "mean_loss": statistics.fmean(losses)}


def _pair_logps(work: DpoWork, model: PeftModel, rows: Sequence[int], collate: GroupCollator) -> Pairs:
    """Return log-probabilities under the policy and, with the adapter disabled, under the reference."""
    collated = collate([work.group(row) for row in rows])
    batch = {key: value.to(work.device) for key, value in collated.items() if isinstance(value, Tensor)}
    head = output_head(model)
    with torch.no_grad(), model.disable_adapter():
        reference = token_logps(model, head, batch).sum(1)
    logps, lengths = token_logps(model, head, batch).sum(1), batch["lengths"]
    return Pairs(
        # Each pair's completions are in the order chosen, rejected.
        chosen_logps=logps[::2],
        rejected_logps=logps[1::2],
        chosen_lengths=lengths[::2],
        rejected_lengths=lengths[1::2],
        reference_chosen_logps=reference[::2],
        reference_rejected_logps=reference[1::2],
    )


def _run_trl(work: DpoWork, model: PeftModel, *, best: bool, max_steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trl_trainer(work, model, folder, best=best, max_steps=max_steps)
        model.delete_adapter("ref")  # TRL then takes the base as reference: cheaper, and equal
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, **summarize_losses(trainer.state.log_history)}


def _make_trl_trainer(
    work: DpoWork, model: PeftModel, folder: str, *, best: bool, max_steps: int
) -> DPOTrainer:
    common = shared_engine_arguments(
        folder, batch_size=work.batch_size, max_steps=max_steps, bfloat16=work.bfloat16
    )
    fast_options: dict[str, Any] = {
        "activation_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "remove_unused_columns": False,
    }
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**common, max_length=None, **(fast_options if best else {})),
        # TRL would tokenize text itself: a dummy row passes its checks, and our token ids replace it below.
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=work.tokenizer,
    )
    columns = to_pair_dataset(work.groups)
    trainer.train_dataset = columns.add_column("length", work.groups.lengths.tolist()) if best else columns
    return trainer


def _max_relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours.float() - theirs.float()).abs() / theirs.float().abs()).max())


@click.command()
@click.option(
    "--data",
    default=EMBEDDED_PREFERENCES,
    show_default=True,
    help="A file of pairs in a layout that recipes support.",
)
@click.option("--rows", default=24, show_default=True, help="Pairs.")
@click.option("--batch-size", default=4, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--bfloat16", is_flag=True, help="bfloat16 in place of float32, for all contenders.")
@click.option("--small", is_flag=True, help="A model of two narrow layers, as a smoke test.")
@click.option(
    "--only", type=click.Choice(CONTENDERS), help="Four steps of one contender, for its peak memory."
)
@click.option("--save", is_flag=True, help=f"Write the result to {RESULTS_DIR.name}/.")
def main(
    data: str,
    rows: int,
    batch_size: int,
    repeats: int,
    bfloat16: bool,
    small: bool,
    only: str | None,
    save: bool,
) -> None:
    """Measure, and print the ratios on the last line."""
    work = build_work(data, rows, batch_size, bfloat16=bfloat16, small=small)
    if only:
        reset_peak_memory()
        run_contender(work, only, max_steps=4)
        click.echo(json.dumps({"peak_memory_gib": round(peak_memory_gib(), 3)}))
        return
    differences = logp_differences(work)
    click.echo(f"largest relative difference of log-probabilities: {differences}")
    assert max(differences.values()) < COMPLETION_TOLERANCE[bfloat16], (
        "log-probabilities differ between contenders"
    )
    runs = []
    for repeat in range(repeats):
        # Alternating order, so that a drift of the machine hits all contenders alike.
        for contender in CONTENDERS if repeat % 2 == 0 else reversed(CONTENDERS):
            runs.append({"repeat": repeat, **run_contender(work, contender)})
            click.echo(json.dumps(runs[-1]))
    arguments = ["--data", data, "--rows", str(rows), "--batch-size", str(batch_size)]
    arguments += ["--bfloat16"] * bfloat16 + ["--small"] * small
    peaks = {
        contender: peak_memory_in_subprocess("benchmarks.dpo", arguments, contender)
        for contender in CONTENDERS
    }
    settings = {"data": Path(data).name, "rows": rows, "batch_size": batch_size}
    result = _result(work, runs, peaks, {**settings, "logps_differ_by": differences})
    if save:
        save_result("dpo", result)
    ratios = ", ".join(f"{name} {value:.2f}x" for name, value in result["times_slower_than_native"].items())
    click.echo(f"peak memory (GiB): {peaks}\ntime of others / native: {ratios}")


def _result(
    work: DpoWork, runs: list[dict[str, Any]], peaks: dict[str, float], settings: dict[str, Any]
) -> dict[str, Any]:
    groups = work.groups
    separate = int((groups.num_completions * groups.prompt_lengths).sum() + groups.completion_lengths.sum())
    return {
        **environment_metadata(bfloat16=work.bfloat16),
        **settings,
        "parameters": sum(parameter.numel() for parameter in work.model.parameters()),
        "tokens_shared": groups.num_tokens,
        "tokens_separate": separate,
        "tokens_with_loss": int(groups.completion_lengths.sum()),
        "times_slower_than_native": times_slower(runs, CONTENDERS),
        "peak_memory_gib": peaks,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
