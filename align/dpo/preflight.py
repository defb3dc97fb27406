"""DPO pre-flight checks: prompt sharing (block mask), gradients, and policy = reference before step 0."""

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
"""Groups among which a probe selects a short and a long one."""
TOKENS = 24
"""Tokens of a prompt and of each completion in a probe, at most."""
COMPLETIONS = 4
"""Completions of a group in a probe, at most."""
SAME = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1, "int8": 5e-1}
"""Rounding tolerance, in nats, for a token's log-probability in two layouts or two batches: the embedded base
gives 1e-5 in float32 and 6e-2 in bfloat16; completions that attend to each other give 1 and more."""
START = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 1e-1}
"""The same for the mean over a completion's tokens, where rounding averages out."""
PROVED_ON = 8
"""Groups on which policy and reference are compared."""


def short_groups(groups: PreferenceGroups) -> list[Example]:
    """Return two truncated groups, of different sizes if the first groups of the data differ."""
    first = [groups[index] for index in range(min(len(groups), LOOKED_AT))]
    first.sort(key=lambda group: (len(group.completion_ids), sum(map(len, group.completion_ids))))
    # Truncated, because the checks run forward and backward several times before training starts.
    cut = [
        replace(
            group,
            # The end of the prompt: its last state predicts every completion.
            prompt_ids=group.prompt_ids[-TOKENS:],
            completion_ids=tuple(ids[:TOKENS] for ids in group.completion_ids[:COMPLETIONS]),
            scores=group.scores[:COMPLETIONS],
            ranks=_distinct(group.ranks[:COMPLETIONS]),
        )
        for group in (first[0], first[-1])
    ]
    return [Example(group) for group in cut]


def _distinct(ranks: np.ndarray) -> np.ndarray:
    """Return ranks with at least two different values: the first ones of a long list may all be tied."""
    return ranks if len(set(ranks.tolist())) > 1 else np.arange(len(ranks), dtype=np.int32)


def layout_tick(
    model: nn.Module, groups: PreferenceGroups, *, pad_id: int, precision: str, stored: str
) -> Tick:
    """Check that prompt sharing leaves log-probabilities unchanged.

    Returns:
        A check result with a warning if it does not: then each completion needs a row of its own.
    """
    some = [example.group.as_tensors() for example in short_groups(groups)]
    with untouched(model), arithmetic(model, precision):
        difference = layout_error(model, output_head(model), some, pad_id=pad_id)
    detail = f"shared-prompt and one-per-row log-probabilities differ by {difference:.1e} nats per token"
    if difference <= SAME["int8" if stored == "int8" else precision]:
        return Tick("layout", f"prompts are shared; {detail}")
    return Tick("layout", f"{detail}: using one row per completion (no shared prompts)", warned=True)


def gradient_ticks(
    model: nn.Module,
    groups: PreferenceGroups,
    collate: PreferenceCollator,
    *,
    objective: Objective,
    precision: str,
    stored: str,
) -> list[Tick]:
    """Check gradient flow, and that a batch's gradient is the sum of its groups'; the model is unchanged.

    If the loss needs a reference, it is the policy itself, as at step 0.
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
    """Check on the run's own rows that policy equals reference before step 0: margin 0, DPO loss ln 2.

    Forward pass, collator and loss are those of training; dropout is off.

    Args:
        trainer: before its first step.
        rows: some of the groups that training uses.
        quantization: of the base's weights.
    """
    objective = trainer.objective
    with untouched(trainer.model):
        found = trainer.scored(trainer.train_dataset, list(rows)).measures
    # Per token: a sum over a long completion would accumulate rounding.
    apart = max(abs(found[name]).max().item() for name in ("chosen_drift", "rejected_drift"))
    loss = float(found["loss"].mean())
    detail = f"policy and reference differ by {apart:.1e} nats per token on {len(rows)} groups"
    told = f"{detail}; margin {float(found['margin'].abs().mean()):.4f}, loss {loss:.4f}{_due(objective)}"
    if apart <= START["int8" if stored == "int8" else trainer.precision]:
        return Tick("reference", told)
    expected = "no difference: the reference is the initial policy (arXiv 2305.18290)"
    repair = "data.cache=false recomputes the reference; if the difference remains, please report a bug"
    return failed("reference", Problem("align.reference", told, expected, repair))


def _due(objective: Objective) -> str:
    return f" (ln 2 = {math.log(2):.4f})" if objective.name == "dpo" else ""


def some_rows(rows: Sequence[int], count: int = PROVED_ON) -> list[int]:
    """Return up to ``count`` of the rows, evenly spaced."""
    picked = np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=int)
    return [rows[index] for index in picked]
