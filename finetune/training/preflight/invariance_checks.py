"""Batch invariance and packing isolation, checked on the run's own model and rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from finetune.data.collate import IGNORE_INDEX, Collator, LMExample, PackedCollator, PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.distributed.collectives import any_rank
from finetune.recipe.errors import Problem
from finetune.training.loss import completion_loss_sum, output_head
from finetune.training.model import DTYPES, Policy, preserve_state, unwrap_model
from finetune.training.preflight.checks import CheckResult, failed
from finetune.training.preflight.gradient_checks import check_gradient_flow
from finetune.training.preflight.isolation import (
    isolation_leak,
    relative_rms,
    rounding_bound,
    rounding_epsilon,
)

PROBE_TOKENS = 64
"""Tokens of a row that a probe uses: a fraction of a training step's compute."""
CANDIDATE_ROWS = 64
"""Rows from which a probe selects one with few and one with many labels."""
PACKED_TOKENS = 32
"""Tokens of the longest of the rows that are packed."""

MIN_BOUND = 1e-2
"""Difference of logits, in their standard deviations, that needs no explanation: wrong positions make 0.1
and more, and a leak is found without a bound."""

LossSum = Callable[[Mapping[str, Tensor]], Tensor]
"""Summed loss of a batch, with gradient."""

TOLERANCE = {"float32": 1e-2, "float16": 5e-2, "bfloat16": 1e-1, "int8": 2e-1}
"""Relative differences that rounding explains (float32 may be TF32 on a GPU). The bundled base on a CPU has
3e-6 in float32, 2e-3 in bfloat16, 4e-2 in int8; attention to a neighboring row makes 0.4."""
SCALE = {"float16": 1024.0}
"""Loss scale of the probe: without it float16 gradients of a mean loss underflow (arXiv 1710.03740)."""


def select_probe_rows(rows: TokenizedRows) -> list[LMExample]:
    """Return the tails of two rows, with the fewest and the most labels among the first rows."""
    tails = [_row_tail(rows[index], PROBE_TOKENS) for index in range(min(len(rows), CANDIDATE_ROWS))]
    tails.sort(key=lambda example: int((example["labels"][1:] != IGNORE_INDEX).sum()))
    return [tails[0], tails[-1]]


def _row_tail(example: LMExample, tokens: int) -> LMExample:
    """Return the last tokens of a row up to its last label."""
    # Tails, because rows often share their beginning, and labels are at the end.
    last = int(torch.nonzero(example["labels"] != IGNORE_INDEX).max()) + 1
    window = slice(max(0, last - tokens), last)
    return LMExample(
        input_ids=example["input_ids"][window], labels=example["labels"][window], row=example["row"]
    )


def check_batch_invariance(
    model: nn.Module,
    loss_sum: LossSum,
    examples: Sequence[LMExample],
    collate: Collator,
    *,
    tolerance: float,
    scale: float = 1.0,
) -> list[CheckResult]:
    """Check that a batch has the loss and gradient of its rows one by one, and that gradients flow.

    The gradient of (full batch - sum of micro-batches) / labels must vanish relative to that of full batch /
    labels. Dropout is off, and the model is not changed.

    Args:
        model: base with adapter.
        loss_sum: summed loss of a batch.
        examples: at least two short rows with different numbers of labels.
        collate: the run's collator.
        tolerance: relative difference that rounding explains.
        scale: loss scale that keeps float16 gradients from vanishing.
    """
    full_batch, micro_batches = collate(examples), [collate([example]) for example in examples]
    num_labels = int((full_batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    return check_micro_batch_invariance(
        model, loss_sum, full_batch, micro_batches, items=num_labels, tolerance=tolerance, scale=scale
    )


def check_micro_batch_invariance(
    model: nn.Module,
    loss_sum: LossSum,
    full_batch: Mapping[str, object],
    micro_batches: Sequence[Mapping[str, object]],
    *,
    items: int,
    tolerance: float,
    scale: float = 1.0,
) -> list[CheckResult]:
    """Check that a batch has the loss and gradient of its micro-batches, as means over ``items``."""
    with preserve_state(model):
        loss = _backward(model, loss_sum, full_batch, scale / items)
        gradient_check = check_gradient_flow(model)
        gradient_norm = _gradient_norm(model)
        # Backward of the negated micro-batches accumulates into the same .grad: the difference is left.
        remainder = sum(
            (_backward(model, loss_sum, micro_batch, -scale / items) for micro_batch in micro_batches), loss
        )
        # 1e-30 only prevents a division by zero.
        difference = max(
            abs(remainder) / max(abs(loss), 1e-30), _gradient_norm(model) / max(gradient_norm, 1e-30)
        )
    if gradient_check.problem:
        return [gradient_check]
    detail = (
        f"{len(micro_batches)} rows in one batch and one by one: loss and gradient differ by {difference:.1e}"
    )
    if difference <= tolerance:
        return [gradient_check, CheckResult("accumulation", detail)]
    expected = f"at most {tolerance:.0e}: the same optimizer step for every micro-batch size"
    repair = (
        "model.attention=eager; if it persists, this model mixes rows of a batch: train.micro_batch_size=1"
    )
    return [
        gradient_check,
        failed("accumulation", Problem("train.micro_batch_size", detail, expected, repair)),
    ]


def _backward(model: nn.Module, loss_sum: LossSum, batch: Mapping[str, object], factor: float) -> float:
    loss = loss_sum(_tensors_on_device(model, batch)) * factor
    if loss.requires_grad:  # otherwise no trained tensor is in the graph, and the gradient check fails
        torch.autograd.backward(loss)
    return float(loss.detach())


def _gradient_norm(model: nn.Module) -> float:
    """Return the norm of all gradients together."""
    norms = [weight.grad.float().norm() for weight in model.parameters() if weight.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def check_packing_isolation(
    model: nn.Module, rows: TokenizedRows, collate: Collator, *, epsilon: float
) -> CheckResult:
    """Check packing isolation: packed rows do not affect each other, and have the logits of rows alone.

    The first is exact. The second also finds position ids that the model ignores; its bound is the effect of
    rounding on this model.

    Args:
        model: base with adapter.
        rows: the training dataset; tails of three of its first rows are packed (repeated if it has fewer).
        collate: the run's packing collator.
        epsilon: relative rounding error of the forward pass (``isolation.rounding_epsilon``).
    """
    # The collator packs the longest first; `_packed_positions` finds the rows again in that order.
    examples = sorted(_rows_to_pack(rows), key=lambda example: -len(example["input_ids"]))
    texts = [example["input_ids"] for example in examples]
    positions = list(_packed_positions(collate(examples)["input_ids"], examples))

    def packed(texts: Sequence[Tensor]) -> list[Tensor]:
        logits = _batch_logits(model, examples, texts, collate)
        return [
            logits[row, start : start + len(ids)] for (row, start), ids in zip(positions, texts, strict=True)
        ]

    def padded(texts: Sequence[Tensor]) -> list[Tensor]:
        logits = _batch_logits(model, examples, texts, PaddedCollator(collate.pad_id))
        return [row[: len(ids)] for row, ids in zip(logits, texts, strict=True)]

    def alone(texts: Sequence[Tensor]) -> list[Tensor]:
        return [
            _forward_logits(model, _tensors_on_device(model, {"input_ids": ids[None]}))[0] for ids in texts
        ]

    vocab_size = unwrap_model(model).config.get_text_config().vocab_size
    with preserve_state(model), torch.no_grad():
        leak, allowed = isolation_leak(packed, padded, texts, vocab_size=vocab_size, distance=relative_rms)
        difference = max(map(relative_rms, alone(texts), packed(texts)))
        bound = MIN_BOUND
        # Sharded ranks must run equally many forward passes.
        if any_rank(difference > MIN_BOUND):
            bound += rounding_bound(model, alone, texts, epsilon=epsilon, distance=relative_rms)
    return _packing_result(len(texts), leak, allowed, difference, bound)


def _packing_result(
    num_rows: int, leak: float, allowed: float, difference: float, bound: float
) -> CheckResult:
    """Check that packed rows do not see each other, and have the logits of rows alone."""
    unit = "of the logits' standard deviation"
    repair = "data.packing=false (rows are batched by length anyway), or model.attention=sdpa"
    if leak > allowed:
        actual = f"other tokens in the neighbors of a packed row change its logits by {leak:.1e} {unit}"
        expected = "no change" if allowed == 0 else f"at most {allowed:.0e}, as for rows that are not packed"
        return failed("packing", Problem("data.packing", actual, f"{expected}: rows are separate", repair))
    detail = f"logits of {num_rows} rows, packed and alone, differ by {difference:.1e} {unit}"
    if difference > bound:
        expected = f"at most {bound:.0e}, the effect of rounding: each row has the positions of a row alone"
        return failed("packing", Problem("data.packing", detail, expected, repair))
    neighbors = "not at all" if leak == 0 else f"by {leak:.1e}"
    return CheckResult("packing", f"{detail}; other tokens in their neighbors change them {neighbors}")


def _batch_logits(
    model: nn.Module, examples: Sequence[LMExample], texts: Sequence[Tensor], collate: Collator
) -> Tensor:
    """Return the logits of examples with other token ids, in one batch."""
    batch = collate([{**example, "input_ids": ids} for example, ids in zip(examples, texts, strict=True)])
    return _forward_logits(model, _tensors_on_device(model, batch))


def _rows_to_pack(rows: TokenizedRows) -> list[LMExample]:
    """Return the tail of a long row, and two pieces of at most half its length, which are packed together."""
    # The pieces are a tail and a beginning: they differ even if the dataset has a single row.
    candidates = list(range(min(len(rows), CANDIDATE_ROWS)))
    longest = _row_tail(
        max((rows[index] for index in candidates), key=lambda row: len(row["input_ids"])), PACKED_TOKENS
    )
    half_length = len(longest["input_ids"]) // 2
    other = rows[candidates[-1]]
    beginning = LMExample(
        input_ids=other["input_ids"][:half_length], labels=other["labels"][:half_length], row=other["row"]
    )
    return [longest, _row_tail(rows[candidates[0]], half_length), beginning]


def _packed_positions(ids_BT: Tensor, examples: Sequence[LMExample]) -> Iterator[tuple[int, int]]:
    """Yield (row, position) of each example's first token in a packed batch, filled longest first."""
    filled_tokens = [0] * len(ids_BT)
    for example in examples:
        ids = example["input_ids"]
        candidates = enumerate(zip(ids_BT, filled_tokens, strict=True))
        row = next(
            (i for i, (row, start) in candidates if torch.equal(row[start : start + len(ids)], ids)), None
        )
        assert row is not None, "the collator packed the rows in another order"
        yield row, filled_tokens[row]
        filled_tokens[row] += len(ids)


def _forward_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    forward = {key: value for key, value in inputs.items() if key not in ("labels", "row_ids")}
    logits: Tensor = model(**forward, use_cache=False).logits
    return logits.float()


def _tensors_on_device(model: nn.Module, batch: Mapping[str, object]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


def check_model(policy: Policy, data: TokenizedRows, collate: Collator) -> list[CheckResult]:
    """Run the numeric checks on the model, without changing it.

    Args:
        policy: base with adapter, on its device.
        data: the tokenized training rows.
        collate: the run's collator.
    """
    model, precision, head = policy.model, policy.precision, output_head(policy.model)
    # Entered by hand: Accelerate, which wraps the forward pass in autocast, has not prepared the model yet.
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "float32")

    def loss_sum(batch: Mapping[str, Tensor]) -> Tensor:
        with autocast:
            return completion_loss_sum(model, head, batch)

    # LLM.int8 (arXiv 2208.07339) selects its outlier columns from the full batch.
    tolerance = TOLERANCE["int8" if policy.quantization == "int8" else precision]
    results = check_batch_invariance(
        model,
        loss_sum,
        select_probe_rows(data),
        collate,
        tolerance=tolerance,
        scale=SCALE.get(precision, 1.0),
    )
    if isinstance(collate, PackedCollator):
        with autocast:
            epsilon = rounding_epsilon(precision, policy.quantization)
            results.append(check_packing_isolation(model, data, collate, epsilon=epsilon))
    return results
