"""Batches for the tests of losses: one by hand, random ones, and a policy of one small table."""

import torch
from torch import Tensor

from align.preference.losses.catalog import Loss
from align.preference.losses.inputs import Lists, Pairs


def by_hand() -> Pairs:
    """One pair: h_w = -10 + 12 = 2, h_l = -14 + 13 = -1, m = 3; per token -10 / 5 = -2 and -14 / 4 = -3.5."""
    numbers = [torch.tensor([number], dtype=torch.float64) for number in (-10, -14, -12, -13)]
    return Pairs(numbers[0], numbers[1], torch.tensor([5]), torch.tensor([4]), numbers[2], numbers[3])


def at_margins(margins: list[float], dtype: torch.dtype = torch.float64) -> Pairs:
    """Pairs whose chosen ratio is the margin, with a gradient, and whose rejected ratio is 0."""
    chosen = torch.tensor(margins, dtype=dtype, requires_grad=True)
    zeros, ones = torch.zeros_like(chosen), torch.ones_like(chosen, dtype=torch.long)
    return Pairs(chosen, zeros, ones, ones, zeros, zeros)


def random_pairs(count: int = 6, seed: int = 0, *, reference: bool = True) -> Pairs:
    lists = random_lists(count, 2, seed, reference=reference)
    return Lists(
        lists.logps, lists.lengths, torch.tensor([[1.0, 0.0]] * count), lists.reference_logps
    ).pairs()


def random_lists(count: int = 5, size: int = 4, seed: int = 0, *, reference: bool = True) -> Lists:
    """Lists of all their completions, of distinct scores, log-probabilities of -0.5 to -3 per token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count, size), generator=generator)

    def logps() -> Tensor:
        per_token = -0.5 - 2.5 * torch.rand(count, size, generator=generator, dtype=torch.float64)
        return per_token * lengths

    scores = torch.rand(count, size, generator=generator, dtype=torch.float64).argsort(-1).double()
    return Lists(logps(), lengths, scores, logps() if reference else None)


def random_batch(loss: Loss, seed: int = 0, *, reference: bool | None = None) -> Pairs | Lists:
    """The loss's input, with a reference if it needs one (or as requested)."""
    wanted = loss.needs.reference if reference is None else reference
    make = random_pairs if loss.takes == "Pairs" else random_lists
    return make(seed=seed, reference=wanted)
