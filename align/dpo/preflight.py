"""DPO pre-flight checks: prompt sharing (block mask), gradients, and policy = reference before step 0."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from align.dpo.collate import PreferenceCollator, PreferenceExample
from align.dpo.objective import PreferenceObjective
from align.dpo.trainer import PreferenceTrainer, to_lists
from align.preference.attention import block_mask_unsupported, forward_cost
from align.preference.logps import shared_layout_errors, token_logps
from align.preference.reference_policy import autocast_for
from align.preference.rows.dataset import PreferenceGroups
from finetune.recipe.errors import Problem
from finetune.training.loss import output_head
from finetune.training.model import Policy, preserve_state, unwrap_model
from finetune.training.preflight.checks import CheckResult, failed
from finetune.training.preflight.invariance_checks import SCALE, TOLERANCE, check_micro_batch_invariance
from finetune.training.preflight.isolation import rounding_epsilon

PROBE_POOL = 64
"""Groups among which a probe selects a short and a long one."""
PREFERENCE_PROBE_TOKENS = 24
"""Tokens of a prompt and of each completion in a probe, at most."""
PROBE_COMPLETIONS = 4
"""Completions of a group in a probe, at most."""
LAYOUT_TOLERANCE = 1e-3
"""Tolerance of a token's log-probability, in nats, in two layouts, besides rounding that is measured: the
bundled base gives 1e-5 in float32. A dependence on other completions is tested on its own."""
REFERENCE_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 1e-1}
"""The same for the mean over a completion's tokens, where rounding averages out."""
NUM_REFERENCE_CHECKS = 8
"""Groups on which policy and reference are compared."""


def probe_examples(groups: PreferenceGroups) -> list[PreferenceExample]:
    """Return two truncated groups, of different sizes if the first groups of the data differ."""
    candidates = [groups[index] for index in range(min(len(groups), PROBE_POOL))]
    candidates.sort(key=lambda group: (len(group.completion_ids), sum(map(len, group.completion_ids))))
    # Truncated, because the checks run forward and backward several times before training starts.
    truncated = [
        replace(
            group,
            # The end of the prompt: its last state predicts every completion.
            prompt_ids=group.prompt_ids[-PREFERENCE_PROBE_TOKENS:],
            completion_ids=tuple(
                ids[:PREFERENCE_PROBE_TOKENS] for ids in group.completion_ids[:PROBE_COMPLETIONS]
            ),
            scores=group.scores[:PROBE_COMPLETIONS],
            ranks=_ranks_with_two_values(group.ranks[:PROBE_COMPLETIONS]),
        )
        for group in (candidates[0], candidates[-1])
    ]
    return [PreferenceExample(group) for group in truncated]


def _ranks_with_two_values(ranks: np.ndarray) -> np.ndarray:
    """Return ranks with at least two different values: the first ones of a long list may all be tied."""
    return ranks if len(set(ranks.tolist())) > 1 else np.arange(len(ranks), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """The collator of a run, and the check that selected its layout; none if there was no choice."""

    collator: PreferenceCollator
    results: tuple[CheckResult, ...] = ()

    def longest_row(self, groups: PreferenceGroups) -> int:
        """Return the tokens of the longest group: a row with the prompt once, or one per completion."""
        if self.collator.one_per_row:
            return groups.longest * int(groups.num_completions.max())
        return int(groups.lengths.max())


def select_layout(
    policy: Policy, groups: PreferenceGroups, *, pad_id: int, virtual_tokens: int
) -> BatchLayout:
    """Return the native trainer's layout: shared prompts if this model can take a block mask.

    Args:
        policy: two forward passes measure whether sharing leaves its log-probabilities unchanged.
        groups: the training data.
        pad_id: any token.
        virtual_tokens: the adapter's; they take positions too, which count against an attention window.
    """
    reason = block_mask_unsupported(
        unwrap_model(policy.model).config, max_positions=groups.longest + virtual_tokens
    )
    if reason:
        one_per_row = PreferenceCollator(pad_id, one_per_row=True)
        return BatchLayout(one_per_row, (CheckResult("layout", f"prompt sharing off: {reason}"),))
    result = check_prompt_sharing(policy, groups, pad_id=pad_id)
    collator = PreferenceCollator(pad_id, one_per_row=result.warned, cost=forward_cost(policy.model))
    return BatchLayout(collator, (result,))


def _rounding(policy: Policy) -> str:
    """Return the key of a rounding tolerance: LLM.int8 rounds more than any precision."""
    return "int8" if policy.quantization == "int8" else policy.precision


def check_prompt_sharing(policy: Policy, groups: PreferenceGroups, *, pad_id: int) -> CheckResult:
    """Check that prompt sharing leaves log-probabilities unchanged.

    Returns:
        A check result with a warning if it does not: then each completion needs a row of its own.
    """
    probe_groups = [example.group.to_group() for example in probe_examples(groups)]
    model = policy.model
    epsilon = rounding_epsilon(policy.precision, policy.quantization)
    with preserve_state(model), autocast_for(model, policy.precision):
        errors = shared_layout_errors(model, output_head(model), probe_groups, pad_id=pad_id, epsilon=epsilon)
    difference, rounding, noise = errors.difference, 0.0, ""
    if _rounding(policy) != "float32":
        # In bfloat16 the largest of a few hundred tokens is 0.2 nats by rounding alone: the mean decides.
        difference, rounding = errors.mean_difference, errors.mean_rounding
        noise = f" (root mean square; {_rounding(policy)} alone: up to {rounding:.1e})"
    detail = (
        f"shared-prompt and one-per-row log-probabilities differ by {difference:.1e} nats per token{noise}"
    )
    if errors.leak > errors.allowed_leak:
        detail = (
            f"other completions of the prompt change log-probabilities by {errors.leak:.1e} nats per token"
        )
    elif difference <= LAYOUT_TOLERANCE + rounding:
        return CheckResult("layout", f"prompts are shared; {detail}")
    return CheckResult("layout", f"{detail}: using one row per completion (no shared prompts)", warned=True)


def check_preference_gradients(
    policy: Policy, groups: PreferenceGroups, collate: PreferenceCollator, objective: PreferenceObjective
) -> list[CheckResult]:
    """Check gradient flow, and that a batch's gradient is the sum of its groups'; the model is unchanged.

    If the loss needs a reference, it is the policy itself, as at step 0.
    """
    model, head = policy.model, output_head(policy.model)

    def loss_sum(batch: Mapping[str, Tensor]) -> Tensor:
        with autocast_for(model, policy.precision):
            logps_CT = token_logps(model, head, batch)
        # Detached: the reference gets no gradient.
        reference = logps_CT.detach() if objective.needs_reference else None
        return objective(to_lists(logps_CT, reference, batch)).losses.sum()

    examples = probe_examples(groups)
    return check_micro_batch_invariance(
        model,
        loss_sum,
        collate(examples),
        [collate([example]) for example in examples],
        items=len(examples),
        tolerance=TOLERANCE[_rounding(policy)],
        scale=SCALE.get(policy.precision, 1.0),
    )


def check_policy_equals_reference(
    trainer: PreferenceTrainer, policy: Policy, used_rows: Sequence[int]
) -> CheckResult:
    """Check that policy and reference agree on the run's rows before step 0: margin 0, DPO loss ln 2.

    Forward pass, collator and loss are those of training; dropout is off.

    Args:
        trainer: before its first step.
        policy: its model.
        used_rows: the groups that training uses; some of them are compared.
    """
    rows = evenly_spaced_rows(used_rows)
    with preserve_state(trainer.model):
        metrics = trainer.forward_rows(trainer.train_dataset, rows).metrics
    # Per token: a sum over a long completion would accumulate rounding.
    difference = max(abs(metrics[name]).max().item() for name in ("logratios/chosen", "logratios/rejected"))
    loss = float(metrics["loss"].mean())
    detail = f"policy and reference differ by {difference:.1e} nats per token on {len(rows)} groups"
    margin = float(metrics["rewards/margins"].abs().mean())
    result = f"{detail}; margin {margin:.4f}, loss {loss:.4f}{_initial_loss_note(trainer.objective)}"
    if difference <= REFERENCE_TOLERANCE[_rounding(policy)]:
        return CheckResult("reference", result)
    expected = "no difference: the reference is the initial policy (arXiv 2305.18290)"
    repair = "data.cache=false recomputes the reference; if the difference remains, please report a bug"
    return failed("reference", Problem("dpo.reference", result, expected, repair))


def _initial_loss_note(objective: PreferenceObjective) -> str:
    return f" (ln 2 = {math.log(2):.4f})" if objective.name == "dpo" else ""


def evenly_spaced_rows(rows: Sequence[int], count: int = NUM_REFERENCE_CHECKS) -> list[int]:
    """Return up to ``count`` of the rows, evenly spaced."""
    indices = np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=int)
    return [rows[index] for index in indices]
