"""Batch invariance and packing isolation, checked on the run's own model and rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from finetune.data.collate import IGNORED, Collator, Example
from finetune.data.dataset import TokenizedRows
from finetune.recipe.errors import Problem
from finetune.training.preflight.gradients import reached
from finetune.training.preflight.ticks import Tick, failed
from finetune.training.preflight.untouched import untouched

TOKENS = 64
"""Tokens of a row that a probe uses: a fraction of a training step's compute."""
LOOKED_AT = 64
"""Rows from which a probe selects one with few and one with many labels."""
PACKED = 32
"""Tokens of the longest of the rows that are packed."""

LossSum = Callable[[Mapping[str, Tensor]], Tensor]
"""Summed loss of a batch, with gradient."""


def short_rows(rows: TokenizedRows) -> list[Example]:
    """Return the tails of two rows, with the fewest and the most labels among the first rows."""
    ends = [_end(rows[index], TOKENS) for index in range(min(len(rows), LOOKED_AT))]
    ends.sort(key=lambda example: int((example["labels"][1:] != IGNORED).sum()))
    return [ends[0], ends[-1]]


def _end(example: Example, tokens: int) -> Example:
    """Return the last tokens of a row up to its last label."""
    # Tails, because rows often share their beginning, and labels are at the end.
    last = int(torch.nonzero(example["labels"] != IGNORED).max()) + 1
    window = slice(max(0, last - tokens), last)
    return Example(
        input_ids=example["input_ids"][window], labels=example["labels"][window], row=example["row"]
    )


def batch_is_its_parts(
    model: nn.Module,
    loss_sum: LossSum,
    examples: Sequence[Example],
    collate: Collator,
    *,
    tolerance: float,
    scale: float = 1.0,
) -> list[Tick]:
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
    whole, parts = collate(examples), [collate([example]) for example in examples]
    labels = int((whole["labels"][:, 1:] != IGNORED).sum())
    return whole_is_its_parts(model, loss_sum, whole, parts, items=labels, tolerance=tolerance, scale=scale)


def whole_is_its_parts(
    model: nn.Module,
    loss_sum: LossSum,
    whole: Mapping[str, object],
    parts: Sequence[Mapping[str, object]],
    *,
    items: int,
    tolerance: float,
    scale: float = 1.0,
) -> list[Tick]:
    """Check batch invariance of collated batches; ``items`` is the denominator of a step's mean loss."""
    with untouched(model):
        loss = _backward(model, loss_sum, whole, scale / items)
        gradient = reached(model)
        size = _size(model)
        # Backward of the negated micro-batches accumulates into the same .grad: the difference is left.
        rest = sum((_backward(model, loss_sum, part, -scale / items) for part in parts), loss)
        difference = max(abs(rest) / max(abs(loss), 1e-30), _size(model) / max(size, 1e-30))
    if gradient.problem:
        return [gradient]
    detail = f"{len(parts)} rows in one batch and one by one: loss and gradient differ by {difference:.1e}"
    if difference <= tolerance:
        return [gradient, Tick("accumulation", detail)]
    expected = f"at most {tolerance:.0e}: the same optimizer step for every micro-batch size"
    repair = (
        "model.attention=eager; if it persists, this model mixes rows of a batch: train.micro_batch_size=1"
    )
    return [gradient, failed("accumulation", Problem("train.micro_batch_size", detail, expected, repair))]


def _backward(model: nn.Module, loss_sum: LossSum, batch: Mapping[str, object], factor: float) -> float:
    loss = loss_sum(_on_device(model, batch)) * factor
    if loss.requires_grad:  # otherwise no trained tensor is in the graph, and the gradient check fails
        torch.autograd.backward(loss)
    return float(loss.detach())


def _size(model: nn.Module) -> float:
    """Return the norm of all gradients together."""
    norms = [weight.grad.float().norm() for weight in model.parameters() if weight.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def packed_is_alone(model: nn.Module, rows: TokenizedRows, collate: Collator, *, tolerance: float) -> Tick:
    """Check packing isolation: packed rows have the logits that each row has in a batch of its own.

    Args:
        model: base with adapter.
        rows: the training dataset; tails of three of its first rows are packed (repeated if it has fewer).
        collate: the run's packing collator.
        tolerance: difference, relative to the logits' standard deviation, that rounding explains.
    """
    examples = sorted(_to_pack(rows), key=lambda example: -len(example["input_ids"]))
    batch = collate(examples)
    # Logits of each row in the packed batch against those of the row in a batch of its own.
    with untouched(model), torch.no_grad():
        together = _logits(model, _on_device(model, batch))
        worst = 0.0
        for example, (line, start) in zip(examples, _found(batch["input_ids"], examples), strict=True):
            ids = example["input_ids"]
            alone = _logits(model, _on_device(model, {"input_ids": ids[None]}))[0]
            beside = together[line, start : start + len(ids)]
            worst = max(worst, float((beside - alone).std() / alone.std()))
    detail = f"logits of {len(examples)} rows, packed and alone, differ by {worst:.1e} standard deviations"
    if worst <= tolerance:
        return Tick("packing", detail)
    expected = f"at most {tolerance:.0e}: a row must not attend to its neighbors"
    repair = "data.packing=false (rows are batched by length anyway), or model.attention=sdpa"
    return failed("packing", Problem("data.packing", detail, expected, repair))


def _to_pack(rows: TokenizedRows) -> list[Example]:
    """Return the tail of a long row, and two pieces of at most half its length, which are packed together."""
    # The pieces are a tail and a beginning: they differ even if the dataset has a single row.
    first = list(range(min(len(rows), LOOKED_AT)))
    longest = _end(max((rows[index] for index in first), key=lambda row: len(row["input_ids"])), PACKED)
    half = len(longest["input_ids"]) // 2
    other = rows[first[-1]]
    beginning = Example(input_ids=other["input_ids"][:half], labels=other["labels"][:half], row=other["row"])
    return [longest, _end(rows[first[0]], half), beginning]


def _found(lines: Tensor, examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """Yield (row, position) of each example's first token in a packed batch, filled longest first."""
    filled = [0] * len(lines)
    for example in examples:
        ids = example["input_ids"]
        places = enumerate(zip(lines, filled, strict=True))
        line = next(
            (i for i, (line, start) in places if torch.equal(line[start : start + len(ids)], ids)), None
        )
        assert line is not None, "the collator packed the rows in another order"
        yield line, filled[line]
        filled[line] += len(ids)


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    forward = {key: value for key, value in inputs.items() if key not in ("labels", "rows")}
    logits: Tensor = model(**forward, use_cache=False).logits
    return logits.float()


def _on_device(model: nn.Module, batch: Mapping[str, object]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
