"""Chain of hindsight (CoH): SFT on pairs of completions, each after a control text that says good or bad.

Liu et al. 2023 (arXiv 2302.02676), section 3: "PROMPT Bad: WORSE Good: BETTER", in either order; completions
carry loss, the feedback does not. At inference the prompt carries the control text of good completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from align.preference.settings import PREFERENCE_SELECT, PreferenceSettings
from data_templates.segments import Message
from finetune.data.conversation import Conversation, with_control_suffix
from finetune.recipe.compatibility import Rule
from finetune.recipe.errors import Problem
from finetune.recipe.settings import NonEmptyStr, Section, StageSettings

if TYPE_CHECKING:
    from align.preference.rows.comparison_rows import ComparisonRows
    from align.preference.rows.comparisons import Comparison
    from finetune.data.dataset import Conversations, PreparedData
    from finetune.data.mapped_cache import Arrays
    from finetune.data.pipeline import EncodedIndex, EncodedRows
    from finetune.data.report import DataReport
    from finetune.data.row_store import Rows
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
    """Read and tokenize a recipe's rows, and log the data report; raises as ``prepare_rows`` does."""
    with ctx.timed("data"):
        data = prepare_rows(ctx.settings, text)
    for line in data.report.lines():
        ctx.log(line)
    return data


def prepare_rows(settings: Settings, text: TextEncoding) -> PreparedData:
    """Read a recipe's preferences and tokenize them as chains of hindsight.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    from align.preference.rows.comparison_rows import ComparisonRows
    from finetune.data.dataset import Conversations, to_prepared_data
    from finetune.data.pipeline import prepare

    seed, controls = settings.train.seed, settings.chain_of_hindsight
    chains = Conversations.of(settings.data, text.encoder, text.max_length)
    kind = Chains(ComparisonRows(settings.data), chains, controls.good, controls.bad, seed)
    return to_prepared_data(prepare(kind, settings.data, seed=seed))


@dataclass(frozen=True)
class Chains:
    """Comparisons, tokenized as chains of hindsight: conversations with some untrained turns.

    Attributes:
        rows: how comparisons are read and held out.
        conversations: how chains are tokenized.
        good: control text of the best completion.
        bad: control text of the worst completion.
        seed: of the random order.
    """

    rows: ComparisonRows
    conversations: Conversations
    good: str
    bad: str
    seed: int

    def encode(self, rows: Rows[Comparison], index: EncodedIndex, report: DataReport) -> Arrays:
        """Return token ids, loss mask and offsets of the chains."""
        from finetune.data.row_store import RowStore

        chains = RowStore(build_chains(rows, good=self.good, bad=self.bad, seed=self.seed)).rows()
        return self.conversations.encode(chains, index, report)

    def samples(self, rows: Rows[Comparison], limit: int | None) -> list[Conversation]:
        """Return each distinct prompt with its best completion."""
        return best_completion_prompts(rows)[:limit]

    def raise_if_empty(self, key: str, encoded: EncodedRows, report: DataReport) -> None:
        """Raise UserError if no row was tokenized."""
        self.conversations.raise_if_empty(key, encoded, report)

    def cache_key(self) -> list[Any]:
        """Return all that decides the tokens besides the data section."""
        return [self.conversations.cache_key(), self.good, self.bad, self.seed]

    def code(self) -> tuple[Path, ...]:
        """Return the folders of this file and of the comparisons."""
        import align.preference.rows

        return (Path(__file__).parent, Path(align.preference.rows.__path__[0]))


def build_chains(rows: Iterable[Comparison], *, good: str, bad: str, seed: int) -> Iterator[Conversation]:
    """Yield each prompt with its best and its worst completion, in random order, as one conversation.

    Args:
        rows: prompts with two completions or more.
        good: control text of the best completion.
        bad: control text of the worst completion.
        seed: of the random order.
    """
    import numpy as np

    random = np.random.default_rng([seed, ORDER_STREAM])
    return (_build_chain(row, good=good, bad=bad, good_first=bool(random.integers(2))) for row in rows)


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
        encoder.tokenizer,
        encoder.name,
        system=encoder.system,
        control_suffix=control_suffix,
        template_options=encoder.template_options,
        reasoning=encoder.reasoning,
    )
    return replace(text, encoder=controlled)
