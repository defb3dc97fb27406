"""TRL engine for preferences: TRL's trainers on our token ids, with precomputed reference log-probabilities.

TRL's preference trainers tokenize strings, but not every token sequence has a string that tokenizes to it
(escaped markers, a truncated prompt). So a trainer is built on a placeholder row, and then our rows replace
its ``train_dataset``, a public attribute of Trainer, in the id columns that its collator documents. The
reference model is the initial policy: its log-probabilities come from TRL's own forward pass, in the columns
that the collator documents for precomputed ones.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from datasets import (
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from align.preference.rows.dataset import PreferenceGroups
from finetune.distributed.collectives import all_gather_object, barrier, shard, unshard
from finetune.distributed.rank import dist_info
from finetune.engines.trl.trainer import unpadded_token_ids
from finetune.training.model import preserve_state

REFERENCE_ADAPTER = "ref"
"""The name of TRL's reference copy of the adapter, which precomputed log-probabilities make unnecessary."""
ROUNDING_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""Difference between reference and initial policy that rounding explains, by precision: of a loss, and of a
token's log-probability in nats."""
PREFERENCE_METRIC_NAMES = {
    "kl": "kto/z",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "mean_reward": "rewards/mean",
}
"""Names of KTOTrainer and RewardTrainer -> ours; others are the same. A tie counts as 0 in TRL's accuracy."""
SUMMED_METRICS = ("logps/chosen", "logps/rejected")
"""Sums over a completion in TRL; our metrics of these names are means per token, so TRL's are not logged."""
PLACEHOLDER_FOLDER = "first-rows"
"""Temporary folder of the placeholder rows while a trainer is built."""
DISABLE_TQDM_ENV = "TQDM_DISABLE"
"""The environment variable that disables TRL's progress bars."""


def to_pair_dataset(groups: PreferenceGroups) -> Dataset:
    """Return pairs in the columns of TRL's ``DataCollatorForPreference``: ids of prompt and completions."""
    # Lists were refused before (`require_pairs`), with their location.
    rows = list(groups)
    assert all(len(row.completion_ids) == 2 for row in rows), "pairs"
    return Dataset.from_dict(
        {
            "prompt_ids": [row.prompt_ids.tolist() for row in rows],
            "chosen_ids": [row.completion_ids[0].tolist() for row in rows],
            "rejected_ids": [row.completion_ids[1].tolist() for row in rows],
        }
    )


def placeholder_rows(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """Return the placeholder rows that a TRL trainer is built on: two completions of one prompt."""
    # A special token as the prompt: no tokenizer merges it with the text after it.
    return {"prompt": [str(tokenizer.eos_token)] * 2, "completion": ["a", "b"]}


@contextmanager
def progress_bars_disabled() -> Iterator[None]:
    """Disable progress bars over the placeholder rows."""
    were_enabled, previous = not are_progress_bars_disabled(), os.environ.get(DISABLE_TQDM_ENV)
    disable_progress_bars()
    os.environ[DISABLE_TQDM_ENV] = "1"
    try:
        yield
    finally:
        if were_enabled:
            enable_progress_bars()
        if previous is None:
            del os.environ[DISABLE_TQDM_ENV]
        else:
            os.environ[DISABLE_TQDM_ENV] = previous


@contextmanager
def shared_dataset(rows: Dataset, args: TrainingArguments) -> Iterator[Dataset]:
    """Yield rows that all processes read from one file."""
    if dist_info().world_size == 1:
        yield rows
        return
    # TRL stores reference log-probabilities in the dataset's cache folder, where the other ranks read them.
    # For rows in memory that is a temporary folder of each process, which the others do not see.
    folder = Path(args.output_dir) / PLACEHOLDER_FOLDER
    if dist_info().is_main:
        rows.save_to_disk(str(folder))
    barrier()
    yield load_from_disk(str(folder))
    barrier()
    if dist_info().is_main:
        rmtree(folder)


def delete_reference_adapter(model: nn.Module) -> None:
    """Delete TRL's reference copy of the adapter: it would stay in memory and be saved with the adapter."""
    if isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(REFERENCE_ADAPTER)


class RenamePreferenceMetrics(Trainer):  # type: ignore[misc]
    """Mixin that renames the metrics a TRL trainer logs to ours; comes after TRL's class in the MRO."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(
            {
                PREFERENCE_METRIC_NAMES.get(name, name): value
                for name, value in logs.items()
                if name not in SUMMED_METRICS
            },
            start_time,
        )


@torch.no_grad()
def completion_logps_by_batch(trainer: Trainer, dataset: Dataset, *, prefix: str = "") -> list[Tensor]:
    """Return completion log-probabilities under the current policy, from the engine's own forward pass.

    The batches are sharded over processes; every process returns the values of all.

    Args:
        trainer: a TRL trainer whose model takes ``fused_lm_head``.
        dataset: rows as its collator takes them.
        prefix: prefix of the collator's tensors.

    Returns:
        (B,) float32 for each batch, in the collator's order.
    """
    logps_by_batch, batch_size = [], trainer.args.per_device_train_batch_size
    # In the trainer's own autocast: the reference must round as the policy does in training.
    with preserve_state(trainer.model), trainer.accelerator.autocast():
        for start in shard(range(0, len(dataset), batch_size)):
            rows = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            logps_by_batch.append(_batch_logps(trainer.model, trainer.data_collator(rows), prefix))
    return unshard(all_gather_object(logps_by_batch))


def _batch_logps(model: nn.Module, batch: Mapping[str, Tensor], prefix: str) -> Tensor:
    device = next(model.parameters()).device
    names = ("input_ids", "attention_mask", "completion_mask")
    ids_BT, mask_BT, completion_mask_BT = (batch[f"{prefix}{name}"].to(device) for name in names)
    labels = ids_BT.masked_fill(completion_mask_BT == 0, -100)
    # TRL's fused head returns log-probabilities at the labels, and never all logits at once.
    inputs: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels}
    logps_BT: Tensor = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
    # Virtual tokens come first: the last T - 1 positions are those of the input.
    return logps_BT[:, 1 - ids_BT.shape[1] :].sum(1).float().cpu()


def find_row_locations(groups: PreferenceGroups, inputs: Mapping[str, Tensor]) -> list[str]:
    """Return the locations of a TRL batch's rows, looked up by the tokens of prompt and completion."""
    location_of_ids: dict[tuple[int, ...], str] = {}
    for group in groups:
        prompt = group.prompt_ids.tolist()
        for completion in group.completion_ids:
            location_of_ids[*prompt, *completion.tolist()] = group.location
    return [location_of_ids[ids] for ids in unpadded_token_ids(inputs) if ids in location_of_ids]
