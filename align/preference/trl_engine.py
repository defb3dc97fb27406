"""The TRL engine: TRL's own preference trainers, fed the same tokens.

TRL's trainers for preferences tokenise strings themselves, and not every token sequence has a string that is
tokenised to it (text that is written apart, a prompt that was cut). So a trainer is made with a row of its
own words, and then given ours as ``train_dataset``, the Trainer's public attribute, in the columns of ids
that its collator documents. Its reference is the policy as it starts, computed with the forward pass that it
trains with and handed over in the columns that its collator documents for precomputed ones.
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
"""What TRL calls its copy of the adapter, which precomputed references make superfluous."""
NAMES = {
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
}
"""TRL's names of what it logs: ours. A tie counts 0 in TRL's accuracy."""
ROWS = "first-rows"
"""The folder, while a trainer is made, of the rows that it is made with."""
BARS = "TQDM_DISABLE"
"""The switch that TRL reads for the bar over its own row."""


def pair_columns(groups: PreferenceGroups) -> Dataset:
    """Return pairs as TRL's ``DataCollatorForPreference`` takes them: ids of prompt and completions."""
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
    """Refuse groups that are no pairs.

    Raises:
        UserError: a group has more than two completions; the first such is named.
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
    """Return what a trainer is made with before it is given our rows: two replies to one prompt.

    The prompt is a special token, which nothing behind it is merged with.
    """
    return {"prompt": [str(tokenizer.eos_token)] * 2, "completion": ["a", "b"]}


@contextmanager
def made_quietly() -> Iterator[None]:
    """Keep back the progress bars over the one row that a trainer is made with."""
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
    """Give rows that several processes have from one file: TRL keeps its reference's numbers beside it.

    Rows in memory have such files in a temporary folder of each process's own, where the others look in vain.
    """
    if world().size == 1:
        yield rows
        return
    folder = Path(args.output_dir) / ROWS
    if world().main:
        rows.save_to_disk(str(folder))
    wait()
    yield load_from_disk(str(folder))
    wait()
    if world().main:
        rmtree(folder)


def without_copy(model: nn.Module) -> None:
    """Take TRL's copy of the adapter away: it would be kept in memory, and saved beside the adapter."""
    if isinstance(model, PeftModel) and COPY in model.peft_config:
        model.delete_adapter(COPY)


class InOurWords(Trainer):  # type: ignore[misc]
    """Stands behind a trainer of TRL, between it and its own base, and names what it logs as we do."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log under our names."""
        super().log({NAMES.get(name, name): value for name, value in logs.items()}, start_time)


@torch.no_grad()
def logps_of(trainer: Trainer, columns: Dataset, *, kind: str = "") -> list[Tensor]:
    """Return log-probabilities of completions under the policy as it is, by the engine's own forward pass.

    Each process looks at its share of the passes, and has the numbers of all.

    Args:
        trainer: one of TRL's, whose model takes ``fused_lm_head``.
        columns: rows as its collator takes them.
        kind: prefix of the collator's tensors.

    Returns:
        Of each pass (lines,) float32, in the collator's order.
    """
    found, size = [], trainer.args.per_device_train_batch_size
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
    return tokens[:, 1 - ids.shape[1] :].sum(1).float().cpu()  # behind virtual tokens


def refuse_not_finite(trainer: Trainer, loss: Tensor, places: Sequence[str]) -> None:
    """Stop a run whose loss is no number.

    Args:
        trainer: at the step in question.
        loss: of a forward pass.
        places: where its lines come from.

    Raises:
        NotFiniteError: NaN or infinite loss; the message names the rows.
    """
    if not torch.isfinite(loss):
        step, named = trainer.state.global_step + 1, ", ".join(dict.fromkeys(places))
        raise NotFiniteError(f"loss is {loss.item()} at step {step}, on {named}")


def places_by_tokens(rows: Mapping[tuple[int, ...], str], lines: Tensor, mask: Tensor) -> list[str]:
    """Return where the lines of a batch come from; TRL passes no numbers on, so tokens are looked up."""
    wanted = [tuple(line[: int(width)].tolist()) for line, width in zip(lines, mask.sum(1), strict=True)]
    return [rows[ids] for ids in wanted if ids in rows]


def places_of(groups: PreferenceGroups) -> dict[tuple[int, ...], str]:
    """Return the place of each completion, by the tokens of prompt and completion."""
    found: dict[tuple[int, ...], str] = {}
    for group in (groups[index] for index in range(len(groups))):
        prompt = group.prompt_ids.tolist()
        found |= {(*prompt, *completion.tolist()): group.place for completion in group.completion_ids}
    return found
