"""TRL engine for preferences: TRL's trainers on our token ids, with precomputed reference log-probabilities.

TRL's preference trainers tokenize strings, but not every token sequence has a string that tokenizes to it
(escaped markers, a truncated prompt). So a trainer is built on a placeholder row, and then our rows replace
its ``train_dataset``, a public attribute of Trainer, in the id columns that its collator documents. The
reference model is the initial policy: its log-probabilities come from TRL's own forward pass, in the columns
that the collator documents for precomputed ones.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
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
from finetune.planning.world import world
from finetune.recipe.errors import Problem, UserError
from finetune.training.preflight.untouched import untouched
from finetune.training.processes import everyones, share, together, wait
from finetune.training.stops import NotFiniteError

NATIVE = "train.engine=native"
COPY = "ref"
"""The name of TRL's reference copy of the adapter, which precomputed log-probabilities make unnecessary."""
NAMES = {
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
}
"""TRL's metric names -> ours. A tie counts as 0 in TRL's accuracy."""
ROWS = "first-rows"
"""Temporary folder of the placeholder rows while a trainer is built."""
BARS = "TQDM_DISABLE"
"""The environment variable that disables TRL's progress bars."""


def pair_columns(groups: PreferenceGroups) -> Dataset:
    """Return pairs in the columns of TRL's ``DataCollatorForPreference``: ids of prompt and completions."""
    # Lists were refused before (`require_pairs`), with their location.
    rows = [groups[index] for index in range(len(groups))]
    assert all(len(row.completion_ids) == 2 for row in rows), "pairs"
    return Dataset.from_dict(
        {
            "prompt_ids": [row.prompt_ids.tolist() for row in rows],
            "chosen_ids": [row.completion_ids[0].tolist() for row in rows],
            "rejected_ids": [row.completion_ids[1].tolist() for row in rows],
        }
    )


def refuse_lists(groups: PreferenceGroups, *, where: str) -> None:
    """Raise if a group is not a pair.

    Raises:
        UserError: a group has more than two completions; the first one is named.
    """
    longer = [index for index, count in enumerate(groups.completions) if count != 2]
    if longer:
        first = groups[longer[0]]
        found = (
            f"{len(longer)} prompts with more than two completions (first: {first.place}, "
            f"{len(first.completion_ids)} completions)"
        )
        raise UserError(Problem(where, found, "pairs, with train.engine 'trl'", NATIVE))


def own_replies(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """Return the placeholder rows that a TRL trainer is built on: two completions of one prompt."""
    # A special token as the prompt: no tokenizer merges it with the text after it.
    return {"prompt": [str(tokenizer.eos_token)] * 2, "completion": ["a", "b"]}


@contextmanager
def made_quietly() -> Iterator[None]:
    """Disable progress bars over the placeholder rows."""
    shown, before = not are_progress_bars_disabled(), os.environ.get(BARS)
    disable_progress_bars()
    os.environ[BARS] = "1"
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
        if before is None:
            del os.environ[BARS]
        else:
            os.environ[BARS] = before


@contextmanager
def seen_by_all(rows: Dataset, args: TrainingArguments) -> Iterator[Dataset]:
    """Yield rows that all processes read from one file."""
    if world().size == 1:
        yield rows
        return
    # TRL stores reference log-probabilities in the dataset's cache folder, where the other ranks read them.
    # For rows in memory that is a temporary folder of each process, which the others do not see.
    folder = Path(args.output_dir) / ROWS
    if world().main:
        rows.save_to_disk(str(folder))
    wait()
    yield load_from_disk(str(folder))
    wait()
    if world().main:
        rmtree(folder)


def without_copy(model: nn.Module) -> None:
    """Delete TRL's reference copy of the adapter: it would stay in memory and be saved with the adapter."""
    if isinstance(model, PeftModel) and COPY in model.peft_config:
        model.delete_adapter(COPY)


class InOurWords(Trainer):  # type: ignore[misc]
    """Mixin that renames the metrics a TRL trainer logs to ours; comes after TRL's class in the MRO."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({NAMES.get(name, name): value for name, value in logs.items()}, start_time)


@torch.no_grad()
def logps_of(trainer: Trainer, columns: Dataset, *, kind: str = "") -> list[Tensor]:
    """Return completion log-probabilities under the current policy, from the engine's own forward pass.

    The batches are sharded over processes; every process returns the values of all.

    Args:
        trainer: a TRL trainer whose model takes ``fused_lm_head``.
        dataset: rows as its collator takes them.
        prefix: prefix of the collator's tensors.

    Returns:
        (B,) float32 for each batch, in the collator's order.
    """
    found, size = [], trainer.args.per_device_train_batch_size
    # In the trainer's own autocast: the reference must round as the policy does in training.
    with untouched(trainer.model), trainer.accelerator.autocast():
        for start in share(range(0, len(columns), size)):
            rows = [columns[index] for index in range(start, min(start + size, len(columns)))]
            found.append(_logps(trainer.model, trainer.data_collator(rows), kind))
    return together(everyones(found))


def _logps(model: nn.Module, batch: Mapping[str, Tensor], kind: str) -> Tensor:
    device = next(model.parameters()).device
    names = ("input_ids", "attention_mask", "completion_mask")
    ids, mask, completion = (batch[f"{kind}{name}"].to(device) for name in names)
    labels = ids.masked_fill(completion == 0, -100)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    tokens: Tensor = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
    # Virtual tokens come first: the last T - 1 positions are those of the input.
    return tokens[:, 1 - ids.shape[1] :].sum(1).float().cpu()


def refuse_not_finite(trainer: Trainer, loss: Tensor, places: Sequence[str]) -> None:
    """Raise if the loss is not finite.

    Args:
        trainer: for the current step.
        loss: of a micro-batch.
        locations: locations (``file:line``) of its rows.

    Raises:
        NotFiniteError: NaN or infinite loss; the message names the rows.
    """
    if not torch.isfinite(loss):
        step, named = trainer.state.global_step + 1, ", ".join(dict.fromkeys(places))
        raise NotFiniteError(f"loss is {loss.item()} at step {step}, on {named}")


def places_by_tokens(rows: Mapping[tuple[int, ...], str], lines: Tensor, mask: Tensor) -> list[str]:
    """Return the locations of a batch's rows, looked up by their tokens: TRL's collators drop row ids."""
    wanted = [tuple(line[: int(width)].tolist()) for line, width in zip(lines, mask.sum(1), strict=True)]
    return [rows[ids] for ids in wanted if ids in rows]


def places_of(groups: PreferenceGroups) -> dict[tuple[int, ...], str]:
    """Return the location of each completion by the token ids of prompt and completion."""
    found: dict[tuple[int, ...], str] = {}
    for group in (groups[index] for index in range(len(groups))):
        prompt = group.prompt_ids.tolist()
        found |= {(*prompt, *completion.tolist()): group.place for completion in group.completion_ids}
    return found
