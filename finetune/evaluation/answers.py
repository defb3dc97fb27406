"""What a model answers to an item: a completion, log-probabilities of choices, or that of a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_templates.segments import Message

Turns = Sequence[Message]


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """A generated completion; ``ended_with_eos`` is False where it reached the maximum length."""

    text: str
    ended_with_eos: bool


@dataclass(frozen=True, slots=True)
class ChoiceAnswer:
    """Log-probability of each choice, the sum over its tokens, and its length in UTF-8 bytes."""

    logps: tuple[float, ...]
    num_bytes: tuple[int, ...]

    @property
    def chosen(self) -> int:
        """Return the index of the most likely choice."""
        return max(range(len(self.logps)), key=self.logps.__getitem__)

    @property
    def chosen_per_byte(self) -> int:
        """Return the index of the choice with the highest log-probability per byte."""
        return max(range(len(self.logps)), key=lambda index: self.logps[index] / self.num_bytes[index])


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """Log-probability of a text, the sum over its tokens but the first, their number, and its UTF-8 bytes."""

    logp: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled.

    Attributes:
        max_new_tokens: maximum tokens of a completion.
        temperature: 0 is greedy decoding.
        seed: of the samples.
        streams: number of each prompt's random stream: its samples do not depend on the other prompts.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    streams: Sequence[int]


class EvalModel(Protocol):
    """A model under evaluation: local weights, or an endpoint."""

    @property
    def label(self) -> str:
        """Return the model's name for people."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return what decides its answers: weights, template, precision."""

    def complete(self, prompts: Sequence[Turns], sampling: Sampling) -> list[CompletionAnswer]:
        """Return a completion of each prompt."""

    def choose(self, questions: Sequence[tuple[Turns, Sequence[str]]], *, style: str) -> list[ChoiceAnswer]:
        """Return the log-probabilities of each question's choices, with (chat) or without (text) a template.

        Raises:
            UserError: the model gives no log-probabilities.
        """

    def read(self, texts: Sequence[str]) -> list[TextAnswer]:
        """Return the log-probability of each text, without a template.

        Raises:
            UserError: the model gives no log-probabilities.
        """
