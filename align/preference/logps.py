"""Log-probabilities of completions: the LM head is applied only at the states that predict their tokens."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.preference.attention import block_attention
from align.preference.groups import Group, GroupCollator
from finetune.lm_head import logits_at
from finetune.training.loss import MAX_LOGITS_PER_CHUNK
from finetune.training.model import unwrap_model
from finetune.training.preflight.isolation import (
    Forward,
    isolation_leak,
    largest_difference,
    rms_difference,
    rounding_bound,
)


def token_logps(
    model: nn.Module,
    head: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    max_elements: int = MAX_LOGITS_PER_CHUNK,
) -> Tensor:
    """Return log p(y_t | x, y_<t) of each token of each completion, in float32.

    The sum over a completion's tokens is log p(completion | prompt).

    Args:
        model: causal LM in any wrapper.
        head: its output embeddings.
        batch: a ``GroupBatch`` on the model's device.
        max_elements: logits that are cast to float32 at a time.

    Returns:
        (C, T) with T the longest completion, with gradients; 0 after a completion's end.
    """
    logits_SV = completion_logits(model, head, batch)
    logps_N = gather_logps(logits_SV, batch["state_index"], batch["targets"], max_elements=max_elements)
    # Padding is 0, so that sums over tokens are log-probabilities of completions.
    logps_CT = logps_N.new_zeros(len(batch["lengths"]), int(batch["lengths"].max()))
    return logps_CT.index_put((batch["completion_index"], batch["token_offset"]), logps_N)


def completion_logits(model: nn.Module, head: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits (S, V) of the states that predict tokens of completions, each state once."""
    one_per_row = "attention_mask" in batch
    # With a block mask the hook sets mask and position ids, so only the ids are passed.
    names = ("input_ids", "attention_mask") if one_per_row else ("input_ids",)
    # One completion per row is ordinary causal attention, which the model's own 2-D mask describes.
    with nullcontext() if one_per_row else block_attention(model, batch):
        return logits_at(model, head, {name: batch[name] for name in names}, batch["predict_mask"])


def gather_logps(logits_SV: Tensor, state_index_N: Tensor, targets_N: Tensor, *, max_elements: int) -> Tensor:
    r"""Return each target token's log-probability, log softmax(logits[state_index_n])[targets_n], in float32.

    Args:
        logits_SV: (S, V), any floating dtype.
        state_index_N: (N,) row of ``logits_SV`` for each target, ascending.
        targets_N: (N,) token ids.
        max_elements: logits per chunk at most.

    Returns:
        (N,).

    >>> logits_SV = torch.tensor([[0.0, 0.0], [1.0986123, 0.0]])
    >>> logps = gather_logps(logits_SV, torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), max_elements=2)
    >>> logps.exp()
    tensor([0.5000, 0.7500, 0.2500])
    """
    rows = max(1, max_elements // logits_SV.shape[-1])
    if len(logits_SV) <= rows:
        return _gather_logps(logits_SV, state_index_N, targets_N)
    # Chunks are recomputed in the backward pass, so that one chunk's float32 copy is alive at a time: with a
    # large vocabulary the float32 logits of all states would dominate memory.
    chunks = torch.split(logits_SV, rows)
    counts = torch.bincount(state_index_N // rows, minlength=len(chunks)).tolist()
    chunked_inputs = zip(
        chunks, torch.split(state_index_N % rows, counts), torch.split(targets_N, counts), strict=True
    )
    return torch.cat(
        [checkpoint(_gather_logps, *chunk_inputs, use_reentrant=False) for chunk_inputs in chunked_inputs]
    )


def _gather_logps(logits_SV: Tensor, state_index_N: Tensor, targets_N: Tensor) -> Tensor:
    # In bfloat16 the differences of log-probabilities would be rounding noise.
    logits_float32 = logits_SV.float()
    return logits_float32[state_index_N, targets_N] - logits_float32.logsumexp(-1)[state_index_N]


@dataclass(frozen=True, slots=True)
class LayoutErrors:
    """How the shared layout differs from one completion per row, in nats of a token's log-probability.

    Attributes:
        difference: largest difference between the two layouts.
        rounding: bound on what rounding alone changes, measured on this model.
        mean_difference: the same as a root mean square over a completion's tokens, of the worst completion.
        mean_rounding: bound on what rounding alone changes of this.
        leak: largest change when only the other completions of the row change; exact for a dense model.
        allowed_leak: the same for completions in rows of their own, times a factor.
    """

    difference: float
    rounding: float
    mean_difference: float
    mean_rounding: float
    leak: float
    allowed_leak: float


@torch.no_grad()
def shared_layout_errors(
    model: nn.Module, head: nn.Module, groups: Sequence[Group], *, pad_id: int, epsilon: float
) -> LayoutErrors:
    """Measure on the loaded model what ``attention.block_mask_unsupported`` infers from its config.

    Args:
        model: causal LM in any wrapper; dropout is off during the measurement.
        head: its output embeddings.
        groups: some of the user's groups, with two completions or more.
        pad_id: any token.
        epsilon: relative rounding error of the forward pass (``isolation.rounding_epsilon``).
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device

    def forward_with(collate: GroupCollator) -> Forward:
        def forward(completions: Sequence[Tensor]) -> list[Tensor]:
            batch = collate(with_completions(groups, completions))
            on_device = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            logps_CT = token_logps(model, head, on_device)
            return [row[:length] for row, length in zip(logps_CT, batch["lengths"].tolist(), strict=True)]

        return forward

    # All groups in one row: masks between groups are measured too.
    shared = forward_with(GroupCollator(pad_id, sum(map(len, groups))))
    one_per_row = forward_with(GroupCollator(pad_id, one_per_row=True))
    completions = [ids for group in groups for ids in group.completions]
    vocab_size = unwrap_model(model).config.get_text_config().vocab_size
    leak, allowed_leak = isolation_leak(
        shared, one_per_row, completions, vocab_size=vocab_size, distance=largest_difference
    )
    outputs = shared(completions), one_per_row(completions)
    differences = [max(map(distance, *outputs)) for distance in (largest_difference, rms_difference)]
    bounds = [
        rounding_bound(model, one_per_row, completions, epsilon=epsilon, distance=distance)
        for distance in (largest_difference, rms_difference)
    ]
    model.train(training)
    (difference, mean_difference), (rounding, mean_rounding) = differences, bounds
    return LayoutErrors(difference, rounding, mean_difference, mean_rounding, leak, allowed_leak)


def with_completions(groups: Sequence[Group], completions: Sequence[Tensor]) -> list[Group]:
    """Return the groups with other completions, given for all groups in their order."""
    remaining = iter(completions)
    return [Group(group.prompt, tuple(islice(remaining, len(group.completions)))) for group in groups]
