"""Chain of hindsight data: the best and the worst completion in one sequence, each after its control text.

Liu et al. 2023 (arXiv 2302.02676), section 3: "PROMPT Bad: WORSE Good: BETTER", in either order; completions
carry loss, the feedback does not. At inference the control text for a good answer selects good completions.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from align.preference.rows.prepare import load_comparisons
from align.preference.rows.records import Comparison
from align.preference.settings import ChainOfHindsightSettings, PreferenceSettings
from data_templates.segments import Message
from finetune.data.conversation import Conversation, with_control_suffix
from finetune.data.dataset import PreparedData, tokenize_conversations
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.training.context import RunContext
from finetune.training.text_encoding import TextEncoding

ORDER_STREAM = 5
"""Seed key of this random stream: independent of those that read and mix the data."""


def build_chains(rows: Iterable[Comparison], *, good: str, bad: str, seed: int) -> list[Conversation]:
    """Return each prompt with its best and its worst completion, in random order, as one conversation.

    Args:
        rows: prompts with two completions or more.
        good: control text of the best completion.
        bad: control text of the worst completion.
        seed: of the random order.
    """
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
    encoder = text.encoder
    controlled = Encoder(
        encoder.tokenizer, encoder.name, system=encoder.system, control_suffix=control_suffix
    )
    return replace(text, encoder=controlled)


def load_chains(
    ctx: RunContext, settings: PreferenceSettings, hindsight: ChainOfHindsightSettings, text: TextEncoding
) -> PreparedData:
    """Read a recipe's preferences, tokenize them as chains of hindsight, and log the data report.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    seed = ctx.recipe.settings.train.seed
    report, held_out_report = DataReport(), DataReport()
    with ctx.timed("data"):
        train, held_out = load_comparisons(settings, seed, report, held_out_report)
        # The SFT pipeline from here on: a chain is a conversation with some untrained turns.
        data = tokenize_conversations(
            build_chains(train, good=hindsight.good, bad=hindsight.bad, seed=seed),
            build_chains(held_out, good=hindsight.good, bad=hindsight.bad, seed=seed),
            settings,
            text.encoder,
            max_length=text.max_length,
            reports=(report, held_out_report),
        )
    for line in data.report.lines():
        ctx.log(line)
    return replace(data, prompts=best_completion_prompts(held_out or train))
