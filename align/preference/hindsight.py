"""Chain of hindsight data: the best and the worst completion in one sequence, each after its control text.

Liu et al. 2023 (arXiv 2302.02676), section 3: "PROMPT Bad: WORSE Good: BETTER", in either order; completions
carry loss, the feedback does not. At inference the control text for a good answer selects good completions.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from align.preference.rows.judged import Comparison
from align.preference.rows.prepare import gather_comparisons
from align.preference.settings import HindsightSettings, PreferenceSettings
from data_templates._segments import Message
from finetune.data.conversation import Conversation, wishing
from finetune.data.dataset import Prepared, prepare_gathered
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.training.job import Job
from finetune.training.text import Text

ORDER = 5
"""Seed key of this random stream: independent of those that read and mix the data."""


def chains(rows: Iterable[Comparison], *, good: str, bad: str, seed: int) -> list[Conversation]:
    """Return each prompt with its best and its worst completion, in random order, as one conversation.

    Args:
        rows: prompts with two completions or more.
        good: control text of the best completion.
        bad: control text of the worst completion.
        seed: of the random order.
    """
    random = np.random.default_rng([seed, ORDER])
    return [_chain(row, good=good, bad=bad, good_first=bool(random.integers(2))) for row in rows]


def _chain(row: Comparison, *, good: str, bad: str, good_first: bool) -> Conversation:
    answers = [(good, row.replies[0]), (bad, row.replies[-1])]
    (first_wish, first), (second_wish, second) = answers if good_first else answers[::-1]
    # Liu et al. mask the loss on everything but the completions: history and feedback are context.
    asked = [replace(turn, trained=False) for turn in wishing(row.prompt, first_wish)]
    turns = [*asked, first, Message("user", second_wish), second]
    return Conversation(turns, row.where, row.source)


def questions(rows: Iterable[Comparison]) -> list[Conversation]:
    """Return each distinct prompt with its best completion, for samples and generation metrics."""
    # Reversed, so that the first row of a prompt is the one that stays.
    first = {row.prompt: row for row in reversed(list(rows))}
    return [Conversation([*row.prompt, row.replies[0]], row.where, row.source) for row in first.values()]


def wishing_text(text: Text, wish: str) -> Text:
    """Return the text settings with a control suffix on every prompt of the tuned model."""
    encoder = text.encoder
    asking = Encoder(encoder.tokenizer, encoder.name, system=encoder.system, wish=wish)
    return replace(text, encoder=asking)


def load_chains(job: Job, settings: PreferenceSettings, words: HindsightSettings, text: Text) -> Prepared:
    """Read a recipe's preferences, tokenize them as chains of hindsight, and log the data report.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    seed = job.recipe.settings.train.seed
    report, aside = DataReport(), DataReport()
    with job.timed("data"):
        train, held_out = gather_comparisons(settings, seed, report, aside)
        # The SFT pipeline from here on: a chain is a conversation with some untrained turns.
        data = prepare_gathered(
            chains(train, good=words.good, bad=words.bad, seed=seed),
            chains(held_out, good=words.good, bad=words.bad, seed=seed),
            settings,
            text.encoder,
            max_length=text.max_length,
            told=(report, aside),
        )
    for line in data.report.lines():
        job.say(line)
    return replace(data, prompts=questions(held_out or train))
