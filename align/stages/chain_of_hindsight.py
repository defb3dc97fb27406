"""Chain of hindsight (CoH): SFT on pairs of completions, each after a control text that says good or bad.

Liu et al. 2023 (arXiv 2302.02676), section 3: "PROMPT Bad: WORSE Good: BETTER", in either order; completions
carry loss, the feedback does not. At inference the prompt carries the control text of good completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from align.preference.settings import PREFERENCE_SELECT, PreferenceSettings
from data_templates.segments import Message
from finetune.data.conversation import Conversation, with_control_suffix
from finetune.recipe.compatibility import Rule
from finetune.recipe.errors import Problem
from finetune.recipe.settings import NonEmptyStr, Section, StageSettings

if TYPE_CHECKING:
    from align.preference.rows.comparisons import Comparison
    from finetune.data.dataset import PreparedData
    from finetune.training.context import RunContext
    from finetune.training.model import TextEncoding
    from finetune.training.stage import Method

PUBLIC = "hh"
"""The default recipe for a base model other than the bundled one."""
ORDER_STREAM = 5
"""Seed key of this random stream: independent of those that read and mix the data."""


class ChainOfHindsightSettings(Section):
    """Chain-of-hindsight feedback, in the language of the data."""

    good: NonEmptyStr = Field(
        "Give a good answer.", description="control text of the best completion, for training and generation"
    )
    bad: NonEmptyStr = Field(
        "Give a bad answer.", description="control text of the worst completion, for training"
    )


class Settings(StageSettings):
    """Recipe of chain of hindsight: preference data and control texts."""

    data: PreferenceSettings = PreferenceSettings()
    chain_of_hindsight: ChainOfHindsightSettings = ChainOfHindsightSettings()


def _check_control_texts(settings: Settings) -> Iterator[Problem]:
    texts = settings.chain_of_hindsight
    if texts.good.strip() == texts.bad.strip():
        actual = "equal to chain_of_hindsight.good"
        yield Problem("chain_of_hindsight.bad", actual, "a different text", "chain_of_hindsight.bad=...")


RULES = (
    PREFERENCE_SELECT,
    Rule(
        "control-texts",
        message="the control texts of good and bad completions differ",
        source="arXiv 2302.02676, section 3",
        find=_check_control_texts,
        reads=("chain_of_hindsight",),
    ),
)


def build(ctx: RunContext[Settings]) -> Method:
    """Load tokenizer, chains and model; training is that of SFT.

    Raises:
        UserError: the data are invalid, or the base cannot be loaded.
    """
    from finetune.stages.sft import SFT
    from finetune.training.loading import load_policy, load_text_encoding

    text = with_control_suffix_encoder(load_text_encoding(ctx), ctx.settings.chain_of_hindsight.good)
    return SFT(ctx, text, load_chains(ctx, text), load_policy(ctx))


def load_chains(ctx: RunContext[Settings], text: TextEncoding) -> PreparedData:
    """Read a recipe's preferences, tokenize them as chains of hindsight, and log the data report.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    from align.preference.rows.prepare import load_comparisons
    from finetune.data.dataset import tokenize_conversations
    from finetune.data.report import DataReport

    settings, seed = ctx.settings.data, ctx.settings.train.seed
    texts = {"good": ctx.settings.chain_of_hindsight.good, "bad": ctx.settings.chain_of_hindsight.bad}
    report, held_out_report = DataReport(), DataReport()
    with ctx.timed("data"):
        train, held_out = load_comparisons(settings, seed, report, held_out_report)
        # The SFT pipeline from here on: a chain is a conversation with some untrained turns.
        data = tokenize_conversations(
            build_chains(train, **texts, seed=seed),
            build_chains(held_out, **texts, seed=seed),
            settings,
            text.encoder,
            max_length=text.max_length,
            reports=(report, held_out_report),
        )
    for line in data.report.lines():
        ctx.log(line)
    return replace(data, prompts=best_completion_prompts(held_out or train))


def build_chains(rows: Iterable[Comparison], *, good: str, bad: str, seed: int) -> list[Conversation]:
    """Return each prompt with its best and its worst completion, in random order, as one conversation.

    Args:
        rows: prompts with two completions or more.
        good: control text of the best completion.
        bad: control text of the worst completion.
        seed: of the random order.
    """
    import numpy as np

    random = np.random.default_rng([seed, ORDER_STREAM])
    return [_build_chain(row, good=good, bad=bad, good_first=bool(random.integers(2))) for row in rows]


def _build_chain(row: Comparison, *, good: str, bad: str, good_first: bool) -> Conversation:
    controlled = [(good, row.replies[0]), (bad, row.replies[-1])]
    (first_control, first), (second_control, second) = controlled if good_first else controlled[::-1]
    # Liu et al. mask the loss on everything but the completions: history and feedback are context.
    prompt = [replace(turn, trained=False) for turn in with_control_suffix(row.prompt, first_control)]
    turns = [*prompt, first, Message("user", second_control), second]
    return Conversation(turns, row.location, row.source)


def best_completion_prompts(rows: Iterable[Comparison]) -> list[Conversation]:
    """Return each distinct prompt with its best completion, for samples and generation metrics."""
    # Reversed, so that the first row of a prompt is the one that stays.
    first = {row.prompt: row for row in reversed(list(rows))}
    return [Conversation([*row.prompt, row.replies[0]], row.location, row.source) for row in first.values()]


def with_control_suffix_encoder(text: TextEncoding, control_suffix: str) -> TextEncoding:
    """Return the text encoding with a control suffix on every prompt of the trained model."""
    from finetune.data.tokens import Encoder

    encoder = text.encoder
    controlled = Encoder(
        encoder.tokenizer, encoder.name, system=encoder.system, control_suffix=control_suffix
    )
    return replace(text, encoder=controlled)
