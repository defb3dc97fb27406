"""What is proved of a preference run before step 0: rows, layout, gradients, and the reference itself."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from align.dpo.collate import Example, PreferenceCollator
from align.dpo.objective import Objective
from align.dpo.scoring import lists_of
from align.dpo.trainer import PreferenceTrainer
from align.preference.logps import layout_error, token_logps
from align.preference.rows.dataset import PreferenceGroups
from align.preference.starting_policy import arithmetic
from finetune.recipe.errors import Problem
from finetune.training.head import output_head
from finetune.training.preflight.probes import whole_is_its_parts
from finetune.training.preflight.ticks import Tick, failed
from finetune.training.preflight.untouched import untouched
from finetune.training.preflight.whole import SCALE, TOLERANCE

LOOKED_AT = 64
"""Groups among which a probe looks for a short and a long one."""
TOKENS = 24
"""Tokens of a prompt and of each completion that a probe takes."""
COMPLETIONS = 4
"""Completions of a group that a probe takes at most."""
SAME = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1, "int8": 5e-1}
"""Nats by which a token's log-probability may differ between two layouts or two batches, from rounding: the
embedded base gives 1e-5 in float32 and 6e-2 in bfloat16; completions that see each other give 1 and more."""
START = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 1e-1}
"""The same for the mean over a completion's tokens, in which rounding averages out."""
PROVED_ON = 8
"""Groups on which the start is compared with the reference."""


def short_groups(groups: PreferenceGroups) -> list[Example]:
    """Return two groups cut short, of different sizes where the first ones have such."""
    first = [groups[index] for index in range(min(len(groups), LOOKED_AT))]
    first.sort(key=lambda group: (len(group.completion_ids), sum(map(len, group.completion_ids))))
    cut = [
        replace(
            group,
            prompt_ids=group.prompt_ids[-TOKENS:],
            completion_ids=tuple(ids[:TOKENS] for ids in group.completion_ids[:COMPLETIONS]),
            scores=group.scores[:COMPLETIONS],
            ranks=_distinct(group.ranks[:COMPLETIONS]),
        )
        for group in (first[0], first[-1])
    ]
    return [Example(group) for group in cut]


def _distinct(ranks: np.ndarray) -> np.ndarray:
    """Return ranks of which two differ: the first of a long list may all be tied."""
    return ranks if len(set(ranks.tolist())) > 1 else np.arange(len(ranks), dtype=np.int32)


def layout_tick(
    model: nn.Module, groups: PreferenceGroups, *, pad_id: int, precision: str, stored: str
) -> Tick:
    """Measure whether completions in one line have the log-probabilities that each has alone.

    Returns:
        A tick with a warning where they do not: then each has to have a line of its own.
    """
    some = [example.group.as_tensors() for example in short_groups(groups)]
    with untouched(model), arithmetic(model, precision):
        difference = layout_error(model, output_head(model), some, pad_id=pad_id)
    detail = f"completions in one line and each in its own differ by {difference:.1e} nats a token"
    if difference <= SAME["int8" if stored == "int8" else precision]:
        return Tick("layout", f"the prompt is shared; {detail}")
    return Tick("layout", f"{detail}: each goes behind its prompt alone, which takes longer", warned=True)


def gradient_ticks(
    model: nn.Module,
    groups: PreferenceGroups,
    collate: PreferenceCollator,
    *,
    objective: Objective,
    precision: str,
    stored: str,
) -> list[Tick]:
    """Check whom the loss reaches, and that a batch is the sum of its groups; the model is left as it was.

    Where the loss needs a reference it is the policy itself, as at step 0.
    """
    head = output_head(model)

    def loss_sum(batch: Mapping[str, Tensor]) -> Tensor:
        with arithmetic(model, precision):
            logps = token_logps(model, head, batch)
        reference = logps.detach() if objective.needs_reference else None
        return objective(lists_of(logps, reference, batch)).losses.sum()

    examples = short_groups(groups)
    return whole_is_its_parts(
        model,
        loss_sum,
        collate(examples),
        [collate([example]) for example in examples],
        items=len(examples),
        tolerance=TOLERANCE["int8" if stored == "int8" else precision],
        scale=SCALE.get(precision, 1.0),
    )


def start_tick(trainer: PreferenceTrainer, rows: Sequence[int], *, stored: str) -> Tick:
    """Check on the run's own rows that the policy starts as its reference: margin 0, the loss that is due.

    The forward pass, the collator and the loss are those of training; dropout is off.

    Args:
        trainer: about to train.
        rows: some of the groups that it will see.
        stored: how the base is stored.
    """
    objective = trainer.objective
    with untouched(trainer.model):
        found = trainer.scored(trainer.train_dataset, list(rows)).measures
    apart = max(abs(found[name]).max().item() for name in ("chosen_drift", "rejected_drift"))
    loss = float(found["loss"].mean())
    detail = f"policy and reference differ by {apart:.1e} nats a token on {len(rows)} groups"
    told = f"{detail}; margin {float(found['margin'].abs().mean()):.4f}, loss {loss:.4f}{_due(objective)}"
    if apart <= START["int8" if stored == "int8" else trainer.precision]:
        return Tick("reference", told)
    expected = "none: the reference is the policy as it starts (arXiv 2305.18290)"
    repair = "data.cache=false computes it anew; if it stays, this is a fault of ours"
    return failed("reference", Problem("align.reference", told, expected, repair))


def _due(objective: Objective) -> str:
    return f" (ln 2 = {math.log(2):.4f})" if objective.name == "dpo" else ""


def some_rows(rows: Sequence[int], count: int = PROVED_ON) -> list[int]:
    """Return up to ``count`` of some rows, at even distances."""
    picked = np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=int)
    return [rows[index] for index in picked]
