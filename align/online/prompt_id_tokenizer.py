"""Feed our own prompt token ids to TRL's online trainers, which accept only text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


class PromptIdTokenizer(PreTrainedTokenizerBase):  # type: ignore[misc]
    """A fake tokenizer for TRL: the text of a prompt is its index, which maps to our encoder's token ids.

    TRL's online trainers tokenize strings themselves, and not every token sequence can be written as a string
    (escaped markers, a truncated prompt, a second BOS).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *, eos_token_id: int
    ) -> None:
        """Map prompt indices to token ids.

        Args:
            tokenizer: the policy's tokenizer.
            prompts: token ids; the text of prompt i is ``str(i)``.
            eos_token_id: EOS token id, which is also the pad token: no mask depends on it.
        """
        # PreTrainedTokenizerBase takes tokens, not ids.
        token = str(tokenizer.convert_ids_to_tokens(eos_token_id))
        super().__init__(eos_token=token, pad_token=token, padding_side="left")
        self.tokenizer = tokenizer
        self.prompts = prompts

    def __call__(self, text: Sequence[str], **kwargs: Any) -> dict[str, list[list[int]]]:
        """Return the token ids of prompts, given by index."""
        return {"input_ids": [list(self.prompts[int(index)]) for index in text]}

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __repr__(self) -> str:
        # The base class's version needs a vocabulary.
        return f"PromptIdTokenizer({len(self.prompts)} prompts)"

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return self.tokenizer.convert_tokens_to_ids(tokens)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Return empty texts: our rewards use the token ids."""
        return [""] * len(sequences)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        """Save the policy's tokenizer with a checkpoint."""
        saved: tuple[str, ...] = self.tokenizer.save_pretrained(str(save_directory))
        return saved
