"""Log-probabilities of completions, computed only at the states that predict them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.preference.attention import block_attention
from align.preference.groups import Group, GroupCollator
from finetune.training.head import logits_at
from finetune.training.loss import MAX_ELEMENTS


def completion_logps(
    model: nn.Module, head: nn.Module, batch: Mapping[str, Tensor], *, max_elements: int = MAX_ELEMENTS
) -> Tensor:
    """Return log p(completion | prompt) = sum_t log p(y_t | x, y_<t) of each completion, in float32.

    Args:
        model: causal model in any wrapper.
        head: its output embeddings.
        batch: a ``GroupBatch`` on the model's device; divided by its ``lengths`` the sums are means, and
            ``sums.split(batch["sizes"].tolist())`` gives those of each group.
        max_elements: logits that are turned into float32 at a time.

    Returns:
        (completions,), with gradients.
    """
    return token_logps(model, head, batch, max_elements=max_elements).sum(1)


def token_logps(
    model: nn.Module, head: nn.Module, batch: Mapping[str, Tensor], *, max_elements: int = MAX_ELEMENTS
) -> Tensor:
    """Return log p(y_t | x, y_<t) of each token of each completion, in float32.

    Returns:
        (completions, longest completion), with gradients; 0 behind a completion's end.
    """
    logits = completion_logits(model, head, batch)
    picked = picked_logps(logits, batch["sources"], batch["targets"], max_elements=max_elements)
    table = picked.new_zeros(len(batch["lengths"]), int(batch["lengths"].max()))
    return table.index_put((batch["owners"], batch["offsets"]), picked)


def completion_logits(model: nn.Module, head: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits (S, vocabulary) of the states that predict tokens of completions, each once."""
    separate = "attention_mask" in batch
    names = ("input_ids", "attention_mask") if separate else ("input_ids",)
    with nullcontext() if separate else block_attention(model, batch):
        return logits_at(model, head, {name: batch[name] for name in names}, batch["predicts"])


def picked_logps(logits: Tensor, sources: Tensor, targets: Tensor, *, max_elements: int) -> Tensor:
    r"""Return log softmax(logits[sources_n])[targets_n] for each n, in float32.

    Over a large vocabulary this is done chunk by chunk and again in the backward pass, so that one chunk's
    float32 copy is alive at a time and not all of them.

    Args:
        logits: (S, vocabulary), any floating type.
        sources: (N,), ascending.
        targets: (N,), token ids.
        max_elements: logits per chunk at most.

    >>> logits = torch.tensor([[0.0, 0.0], [1.0986123, 0.0]])
    >>> found = picked_logps(logits, torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), max_elements=2)
    >>> found.exp()
    tensor([0.5000, 0.7500, 0.2500])
    """
    rows = max(1, max_elements // logits.shape[-1])
    if len(logits) <= rows:
        return _picked(logits, sources, targets)
    chunks = torch.split(logits, rows)
    counts = torch.bincount(sources // rows, minlength=len(chunks)).tolist()
    parts = zip(chunks, torch.split(sources % rows, counts), torch.split(targets, counts), strict=True)
    return torch.cat([checkpoint(_picked, *part, use_reentrant=False) for part in parts])


def _picked(logits: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    scores = logits.float()
    return scores[sources, targets] - scores.logsumexp(-1)[sources]


@torch.no_grad()
def layout_error(model: nn.Module, head: nn.Module, groups: Sequence[Group], *, pad_id: int) -> float:
    """Return the largest difference that the shared layout makes to the log-probability of a token.

    What a config tells (``attention.why_separate``) can be measured on the model at hand: rounding gives
    1e-6 in float32, completions that see each other give 0.1 and more.

    Args:
        model: causal model in any wrapper; it is measured without dropout.
        head: its output embeddings.
        groups: some of the user's, with two completions or more; they go through in two forward passes.
        pad_id: any token.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    collators = (GroupCollator(pad_id, sum(map(len, groups))), GroupCollator(pad_id, separate=True))
    shared, separate = (
        token_logps(
            model, head, {k: v.to(device) for k, v in collate(groups).items() if isinstance(v, Tensor)}
        )
        for collate in collators
    )
    model.train(training)
    return float((shared - separate).abs().max())
