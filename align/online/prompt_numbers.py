"""Prompts for TRL's online trainers: it is given numbers for texts, and ids that our encoder wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


class PromptNumbers(PreTrainedTokenizerBase):  # type: ignore[misc]
    """Stands where TRL expects a tokenizer: a prompt's text is its number, its ids are ready.

    TRL's trainers of this kind tokenise strings themselves, and not every token sequence has a string that is
    tokenised to it (text that is written apart, a prompt that was cut, a second BOS).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *, end: int
    ) -> None:
        """Bind prompts to their numbers.

        Args:
            tokenizer: the policy's.
            prompts: token ids; number i is the text ``str(i)``.
            end: the token that ends a reply, and pads: no mask depends on it.
        """
        token = str(tokenizer.convert_ids_to_tokens(end))
        super().__init__(eos_token=token, pad_token=token, padding_side="left")
        self.tokenizer = tokenizer
        self.prompts = prompts

    def __call__(self, text: Sequence[str], **kwargs: Any) -> dict[str, list[list[int]]]:
        """Return the ids of prompts, given by number."""
        return {"input_ids": [list(self.prompts[int(number)]) for number in text]}

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokenizer)

    def __repr__(self) -> str:
        """Return what this is; the library's own words need a vocabulary."""
        return f"PromptNumbers({len(self.prompts)} prompts)"

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the ids of tokens."""
        return self.tokenizer.convert_tokens_to_ids(tokens)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Return no texts: replies are judged by their tokens."""
        return [""] * len(sequences)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        """Save the policy's tokenizer, for a checkpoint."""
        saved: tuple[str, ...] = self.tokenizer.save_pretrained(str(save_directory))
        return saved
