"""The data section of the preference stages, and its rules."""

from collections.abc import Iterator
from typing import Literal, Protocol

from pydantic import Field

from finetune.recipe.compatibility import Rule, is_set
from finetune.recipe.errors import Problem
from finetune.recipe.limits import AtMost
from finetune.recipe.settings import AtLeastTwo, DataSettings


class PreferenceSettings(DataSettings):
    """Preference data: how pairs, ranked lists and labels are read, truncated and filtered."""

    # Null: half, as in the DPO authors' code (max_length 512, max_prompt_length 256) and TRL's.
    max_prompt_length: AtLeastTwo | None = Field(
        None,
        description="minimum number of prompt tokens to keep, from the end, if prompt and completion exceed "
        "max_length; null: half of max_length",
    )
    # The DPO loss compares completions of one prompt (Rafailov et al. 2023, arXiv 2305.18290, equation 7).
    on_different_prompts: Literal["drop", "chosen"] = Field(
        "drop",
        description="pairs with two different prompts: drop, or use the prompt of the chosen completion",
    )
    # Bradley-Terry has no probability for a tie; zephyr's published set keeps pairs of equal scores.
    on_tie: Literal["drop", "keep"] = Field(
        "drop",
        description="pairs with equal scores: drop, or keep with the order of the row",
    )
    # The losses compare the log-probabilities of whole completions.
    reasoning: Literal["keep", "strip"] = Field(
        "keep", description="thoughts of replies: a part of the completion, or removed"
    )
    # Only the last reply of a conversation is compared.
    loss_on: Literal["assistant"] = Field("assistant", description="loss on the completions, including EOS")


class PreferenceSections(Protocol):
    """The sections of a stage that the rules of preference data read."""

    data: PreferenceSettings


def prompt_length_problems(max_prompt_length: int, max_length: int) -> Iterator[Problem]:
    """Yield the problem of prompts that leave no tokens for completions."""
    if max_prompt_length >= max_length:
        actual = f"{max_prompt_length}, but prompt and completion together have {max_length} tokens"
        repair = f"data.max_prompt_length={max_length // 2}, or data.max_length={2 * max_prompt_length}"
        yield Problem("data.max_prompt_length", actual, "less, to leave tokens for completions", repair)


def scaled_prompt_length(max_prompt_length: int, max_length: int) -> int:
    """Return a recipe's number of prompt tokens, at most half of a row if it leaves no completion."""
    return max_prompt_length if max_prompt_length < max_length else max_length // 2


def _check_no_selection(settings: PreferenceSections) -> Iterator[Problem]:
    data = settings.data
    selections = {"data.select": data.select}
    selections |= {
        f"data.mix[{index}].select": component.select for index, component in enumerate(data.mix or [])
    }
    for key, select in selections.items():
        if select is not None:
            yield Problem(key, "selects conversations", "null for preference data", "remove it")


def _check_prompt_length(settings: PreferenceSections) -> Iterator[Problem]:
    data = settings.data
    assert data.max_prompt_length is not None and data.max_length is not None
    if isinstance(data.max_prompt_length, AtMost):  # scaled when the rows are read
        return
    yield from prompt_length_problems(data.max_prompt_length, data.max_length)


PREFERENCE_SELECT = Rule(
    "preference-select",
    message="select filters conversations, not preference data",
    source="finetune/data/selection.py",
    find=_check_no_selection,
    reads=("data",),
)
PROMPT_LENGTH = Rule(
    "prompt-length",
    {"data.max_prompt_length": is_set, "data.max_length": is_set},
    "data.max_prompt_length is less than data.max_length, to leave tokens for completions",
    source="align/preference/rows/encode.py",
    find=_check_prompt_length,
    reads=("data",),
)
