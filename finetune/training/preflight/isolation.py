"""Does a text's output depend on the other texts of its row? Measured by changing the others.

Comparing a packed row with the row alone needs a bound on rounding, and in bfloat16 rounding hides a leak of
several percent. If only the neighbors' tokens change, the arithmetic on the text itself stays the same: same
shapes, same kernels, and masked weights that are exactly 0. A dense model then returns the same bits, so any
change is a leak. Where texts in rows of their own affect each other too (a mixture's experts batch tokens of
all rows, int8 selects its outlier columns from all of them), that effect is measured and is the bound.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from finetune.distributed.collectives import any_rank
from finetune.training.model import DTYPES, unwrap_model

Forward = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Texts (token ids) to an output of each, in the same order: logits, log-probabilities or scores."""
Distance = Callable[[Tensor, Tensor], float]
"""Distance of two outputs of a text."""
ROUNDING_FACTOR = 4.0
"""How many times the measured noise a difference may be: the noise is the largest of few measurements."""
NEIGHBOR_VARIANTS = 3
"""Changed neighbors from which the noise between texts in rows of their own is measured."""
INT8_EPSILON, TF32_EPSILON = 2.0**-7, 2.0**-10
"""Relative rounding of LLM.int8's activations (127 levels), and of TF32 (10 bits)."""


def relative_rms(output: Tensor, other: Tensor) -> float:
    """Return the root mean square of the difference, relative to the outputs' standard deviation."""
    output, other = output.float(), other.float()
    scale = output.std() if output.numel() > 1 else output.abs().max()
    # An output of zeros, as of a new score head, differs by 0.
    return float((output - other).pow(2).mean().sqrt() / scale.clamp_min(1e-30))


def largest_difference(output: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((output.float() - other.float()).abs().max())


def rms_difference(output: Tensor, other: Tensor) -> float:
    """Return the root mean square of the difference: the largest one of many is mostly rounding."""
    return float((output.float() - other.float()).pow(2).mean().sqrt())


def rounding_epsilon(precision: str, quantization: str = "none") -> float:
    """Return the relative rounding error of a forward pass's arithmetic."""
    epsilon = torch.finfo(DTYPES[precision]).eps
    if precision == "float32" and torch.get_float32_matmul_precision() != "highest":
        epsilon = TF32_EPSILON
    return max(epsilon, INT8_EPSILON) if quantization == "int8" else epsilon


def other_tokens(texts: Sequence[Tensor], vocab_size: int, *, variant: int = 0) -> list[Tensor]:
    """Return texts of the same lengths with other tokens at every position."""
    # From the middle of the vocabulary: special tokens are at its ends, and some need inputs of their own.
    changed = []
    for index, ids in enumerate(texts):
        tokens = vocab_size // 2 + (torch.arange(len(ids)) + 7 * index + 13 * variant) % (vocab_size // 4 + 1)
        tokens = tokens.to(ids)
        changed.append(torch.where(tokens == ids, tokens - 1, tokens))
    return changed


def neighbor_effect(
    forward: Forward, texts: Sequence[Tensor], changed: Sequence[Tensor], distance: Distance
) -> float:
    """Return the largest change of a text's output when its neighbors change; three forward passes.

    Args:
        forward: a batch of all texts, in which a text's neighbors are the previous and the next one.
        texts: token ids.
        changed: other token ids of the same lengths.
        distance: distance of two outputs.
    """
    before, effects = forward(texts), [0.0]
    for parity in (0, 1):
        # Every other text changes, so that each unchanged one is between changed ones.
        mixed = [changed[index] if index % 2 == parity else ids for index, ids in enumerate(texts)]
        after = forward(mixed)
        effects += [distance(before[index], after[index]) for index in range(1 - parity, len(texts), 2)]
    return max(effects)


def isolation_leak(
    together: Forward, separate: Forward, texts: Sequence[Tensor], *, vocab_size: int, distance: Distance
) -> tuple[float, float]:
    """Return the effect of neighbors in one row, and the largest one that is no leak; a collective.

    Args:
        together: a batch whose rows hold several texts.
        separate: a batch with one text per row.
        texts: token ids of two texts or more.
        vocab_size: number of tokens.
        distance: distance of two outputs.
    """
    leak = neighbor_effect(together, texts, other_tokens(texts, vocab_size), distance)
    # Sharded ranks must run equally many forward passes.
    if not any_rank(leak > 0):
        return leak, 0.0
    effects = [
        neighbor_effect(separate, texts, other_tokens(texts, vocab_size, variant=variant), distance)
        for variant in range(NEIGHBOR_VARIANTS)
    ]
    # Kernels with atomic additions differ even between equal forward passes.
    repeated = max(map(distance, together(texts), together(texts)))
    return leak, ROUNDING_FACTOR * max(*effects, repeated)


def rounding_bound(
    model: nn.Module, forward: Forward, texts: Sequence[Tensor], *, epsilon: float, distance: Distance
) -> float:
    """Return a bound on what rounding alone changes: from the effect of embeddings rounded otherwise.

    Layouts differ in their shapes, so that kernels add in another order. How much a model amplifies that
    depends on its depth, norms and soft caps: it is measured and not assumed.

    Args:
        model: model in any wrapper.
        forward: its forward pass, one text per row.
        texts: token ids.
        epsilon: relative rounding error (``rounding_epsilon``).
        distance: distance of two outputs.
    """

    def perturb(module: nn.Module, args: object, output: Tensor) -> Tensor:
        signs = torch.empty_like(output).bernoulli_(0.5) * 2 - 1
        return output * (1 + epsilon * signs)

    before = forward(texts)
    handle = unwrap_model(model).get_input_embeddings().register_forward_hook(perturb)
    try:
        after = forward(texts)
    finally:
        handle.remove()
    return ROUNDING_FACTOR * max(map(distance, before, after))
