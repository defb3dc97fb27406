"""Inputs and outputs of preference losses, and the declaration of what a loss needs.

A loss is one function of `pairwise.py` or `listwise.py`:

    def dpo(pairs: Annotated[Pairs, Needs(reference=True)], *, beta: PositiveSetting = 0.1) -> LossOutput

Its first parameter declares its inputs, the others are its settings with their ranges. `catalog.py` parses
both from the file, without importing torch: there is nothing to register.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Needs:
    """What a loss needs besides the policy's log-probabilities.

    Attributes:
        reference: whether it needs the reference's log-probabilities.
        over_tokens: whether it compares log-probabilities summed or averaged over a completion's tokens;
            ``setting``: its setting ``length_normalized`` decides. Inputs are always sums and lengths.
        nll: whether it adds the chosen completion's negative log-likelihood, weighted by ``nll_weight``.
    """

    reference: bool = False
    over_tokens: Literal["sum", "mean", "setting"] = "sum"
    nll: bool = False


LARGEST_SETTING = 1e30
"""Settings are below it, so that their products with log-probabilities are float32 numbers."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The interval of a setting's values: above (or from) ``low``, and below ``high``."""

    low: float
    high: float = LARGEST_SETTING
    with_low: bool = False

    def __contains__(self, number: float) -> bool:
        """Return whether the number is in the interval; NaN is not."""
        return self.low < number < self.high or (self.with_low and number == self.low)

    def __str__(self) -> str:
        low = f"{self.low:g} or more" if self.with_low else f"above {self.low:g}"
        return low if self.high == LARGEST_SETTING else f"{low} and below {self.high:g}"


PositiveSetting = Annotated[float, Interval(0)]
NonNegativeSetting = Annotated[float, Interval(0, with_low=True)]
FlipRate = Annotated[float, Interval(0, 0.5, with_low=True)]
"""The assumed fraction of pairs with swapped labels; at 0.5 labels carry no information."""
PositiveFlipRate = Annotated[float, Interval(0, 0.5)]
Switch = Literal[False, True]


class LossOutput(NamedTuple):
    """Loss per pair or list, not reduced, and detached implicit rewards of its best and worst completion."""

    losses: "Tensor"
    chosen_rewards: "Tensor"
    rejected_rewards: "Tensor"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two completions of each prompt, the first preferred; every tensor has the shape (pairs,).

    Attributes:
        chosen_logps: log-probability of the chosen completion under the policy, summed over tokens, in nats.
        rejected_logps: the same of the rejected one.
        chosen_lengths: tokens of the chosen completion, those that ``chosen_logps`` sums over.
        rejected_lengths: the same of the rejected one.
        reference_chosen_logps: as ``chosen_logps``, under the reference; None if the loss needs none.
        reference_rejected_logps: the same of the rejected one.
    """

    chosen_logps: "Tensor"
    rejected_logps: "Tensor"
    chosen_lengths: "Tensor"
    rejected_lengths: "Tensor"
    reference_chosen_logps: "Tensor | None" = None
    reference_rejected_logps: "Tensor | None" = None

    def __post_init__(self) -> None:
        """Refuse shapes that would broadcast, (pairs,) against (pairs, 1).

        Raises:
            ValueError: the tensors are not all of one shape (pairs,).
        """
        _check_same_shape(
            1, self.chosen_logps, self.rejected_logps, self.chosen_lengths, self.rejected_lengths
        )
        _check_same_shape(1, self.chosen_logps, self.reference_chosen_logps, self.reference_rejected_logps)

    @property
    def chosen_logratios(self) -> "Tensor":
        """Log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen_logps - _require_reference(self.reference_chosen_logps)

    @property
    def rejected_logratios(self) -> "Tensor":
        """Log pi(rejected) - log pi_ref(rejected)."""
        return self.rejected_logps - _require_reference(self.reference_rejected_logps)

    @property
    def margins(self) -> "Tensor":
        """Log-ratio of chosen minus log-ratio of rejected: (pairs,)."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def chosen_mean_logps(self) -> "Tensor":
        """Log pi(chosen) per token."""
        return self.chosen_logps / self.chosen_lengths.clamp(min=1)

    @property
    def rejected_mean_logps(self) -> "Tensor":
        """Log pi(rejected) per token."""
        return self.rejected_logps / self.rejected_lengths.clamp(min=1)


@dataclass(frozen=True, slots=True)
class Lists:
    """K completions of each prompt with their scores; every tensor has the shape (groups, K), in any order.

    Attributes:
        logps: log-probability of each completion under the policy, summed over its tokens, in nats.
        lengths: tokens of each completion; 0 for missing completions, whose other values are ignored.
        scores: score of each completion, higher is better. Equal scores are ties, which form no pair.
        reference_logps: as ``logps``, under the reference; None if the loss needs none.
    """

    logps: "Tensor"
    lengths: "Tensor"
    scores: "Tensor"
    reference_logps: "Tensor | None" = None

    def __post_init__(self) -> None:
        """Refuse shapes that would broadcast.

        Raises:
            ValueError: the tensors are not all of one shape (groups, K).
        """
        _check_same_shape(2, self.logps, self.lengths, self.scores, self.reference_logps)

    @property
    def present(self) -> "Tensor":
        """Whether the completion exists: (groups, K)."""
        return self.lengths > 0

    @property
    def logratios(self) -> "Tensor":
        """Log pi - log pi_ref of each completion: (groups, K), 0 for missing ones."""
        return (self.logps - _require_reference(self.reference_logps)).masked_fill(~self.present, 0.0)

    @property
    def mean_logps(self) -> "Tensor":
        """Log pi per token of each completion: (groups, K), 0 for missing ones."""
        # Clamped, because missing completions have length 0: masking a division by zero leaves a NaN
        # gradient.
        return (self.logps / self.lengths.clamp(min=1)).masked_fill(~self.present, 0.0)

    @property
    def better(self) -> "Tensor":
        """Whether completion i has a higher score than j, at [group, i, j]: (groups, K, K)."""
        return better_than(self.scores, self.present)

    @property
    def best(self) -> "Tensor":
        """Whether no completion of the group is better; true for several if the best are tied."""
        return self.present & ~self.better.any(-2)

    @property
    def worst(self) -> "Tensor":
        """Whether no completion of the group is worse."""
        return self.present & ~self.better.any(-1)

    def pairs(self) -> Pairs:
        """Return every pair of unequal scores as chosen and rejected, in the order of ``better.nonzero()``.

        This is how a loss on pairs is applied to a ranked list.
        """
        group, chosen, rejected = self.better.nonzero(as_tuple=True)
        reference = self.reference_logps
        return Pairs(
            chosen_logps=self.logps[group, chosen],
            rejected_logps=self.logps[group, rejected],
            chosen_lengths=self.lengths[group, chosen],
            rejected_lengths=self.lengths[group, rejected],
            reference_chosen_logps=None if reference is None else reference[group, chosen],
            reference_rejected_logps=None if reference is None else reference[group, rejected],
        )


def better_than(scores: "Tensor", present: "Tensor") -> "Tensor":
    """Return whether i and j exist and i has the higher score, at [group, i, j]: (groups, K, K).

    Args:
        scores: (groups, K), higher is better.
        present: (groups, K), whether the completion exists.
    """
    both = present[:, :, None] & present[:, None, :]
    return both & (scores[:, :, None] > scores[:, None, :])


def _require_reference(reference: "Tensor | None") -> "Tensor":
    if reference is None:
        raise ValueError("this loss needs reference log-probabilities; none were given")
    return reference


def _check_same_shape(dimensions: int, *tensors: "Tensor | None") -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors if tensor is not None]
    if len(set(shapes)) != 1 or len(shapes[0]) != dimensions:
        raise ValueError(f"expected tensors of one shape with {dimensions} dimensions, found {shapes}")
