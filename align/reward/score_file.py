"""Score a file with a reward model: single completions, preference pairs, ranked lists."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from align.preference.rows.fields import completion_turns, prompt_turns, split_completion
from align.preference.rows.layouts import RANKINGS, PreferenceRow, ScoredCompletion
from align.reward.metrics import ScoredComparisons, pair_comparisons
from align.reward.scorer import TOTAL, RewardModel
from data_templates.segments import REPLY_ROLES, Message
from finetune.data.fields import RowError
from finetune.data.layouts import CONVERSATION_LAYOUTS, Layout, match_layout, with_context
from finetune.data.readers import SourceRow
from finetune.data.rows import parse_rows
from finetune.data.sources import read_source
from finetune.evaluation.small_samples import wilson_interval
from finetune.recipe.disk import OUTPUT_REPAIR, writing
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_rows import from_python

COLUMNS_REPAIR = "rename the columns: prompt and completion, or prompt, chosen and rejected"
LENGTH_BASELINE = "length"
"""Longest-wins baseline: the longer completion (in characters) is predicted to be better."""


@dataclass(frozen=True)
class ScoredRow:
    """A row with the scores of its completions by reward name.

    ``scores`` is empty if the row has no reply to score.
    """

    row: SourceRow
    preference: PreferenceRow
    scores: Mapping[str, list[float]]
    normalized: Mapping[str, list[float]]

    @property
    def ranks(self) -> list[int] | None:
        """Return the completions' ranks, 0 for the best; None if the row is unranked."""
        completions = self.preference.completions
        if self.preference.ordered:
            return list(range(len(completions)))
        scores = [completion.score for completion in completions]
        is_ranked = len(completions) > 1 and all(completion.scored for completion in completions)
        return [sum(other > score for other in scores) for score in scores] if is_ranked else None

    def to_dict(self) -> dict[str, Any]:
        """Return the row with its rewards: a number for a single completion, a list for several."""
        single = len(self.preference.completions) == 1
        rewards_by_name = {name: values[0] if single else values for name, values in self.scores.items()}
        normalized_by_name = {
            name: values[0] if single else values for name, values in self.normalized.items()
        }
        rewards = {**rewards_by_name, "normalized": normalized_by_name} if self.scores else None
        winner = {"winner": self.winner} if self.preference.ordered and self.scores else {}
        return {**self.row.columns, "rewards": rewards, **winner}

    @property
    def winner(self) -> str:
        """Return which completion of a pair has the higher total reward: chosen, rejected or tie."""
        chosen, rejected = self.scores[TOTAL]
        return "tie" if chosen == rejected else "chosen" if chosen > rejected else "rejected"


def score_file(model: RewardModel, source: Any) -> list[ScoredRow]:
    """Score the completions of every row of a file.

    Args:
        model: the reward model.
        source: file, folder, Hub id, or a table of rows.

    Raises:
        UserError: unknown layout of the rows, or the template cannot render them.
    """
    rows = read_source(from_python(source))
    where = source if isinstance(source, str) else "rows"
    layout = match_layout(
        list(rows[0].columns), SCORABLE_LAYOUTS, columns=None, where=where, repair=COLUMNS_REPAIR
    )
    preferences = parse_rows(rows, layout, None)
    conversations = [list(_conversations(preference)) for preference in preferences]
    if not any(conversations):
        raise UserError(Problem(where, "no row ends with a reply", "completions to score"))
    locations = [
        row.location
        for row, row_conversations in zip(rows, conversations, strict=True)
        for _ in row_conversations
    ]
    scores = model.score_conversations(
        [conversation for row_conversations in conversations for conversation in row_conversations], locations
    )
    normalized = model.normalized(scores)
    ends = np.cumsum([len(row_conversations) for row_conversations in conversations]).tolist()
    return [
        ScoredRow(
            row,
            preference,
            {
                name: values[end - len(row_conversations) : end]
                for name, values in scores.items()
                if row_conversations
            },
            {
                name: values[end - len(row_conversations) : end]
                for name, values in normalized.items()
                if row_conversations
            },
        )
        for row, preference, row_conversations, end in zip(
            rows, preferences, conversations, ends, strict=True
        )
    ]


def write_scored_rows(rows: Sequence[ScoredRow], path: Path) -> None:
    """Write the rows with their rewards as JSON Lines.

    Raises:
        StorageError: the disk is full or read-only.
    """
    # default=str: columns of a dataset may hold what JSON cannot, such as dates.
    json_lines = [json.dumps(row.to_dict(), ensure_ascii=False, default=str) for row in rows]
    text = "\n".join(json_lines) + "\n"
    with writing(path, needed=len(text), repair=OUTPUT_REPAIR):
        path.write_text(text, encoding="utf-8")


def score_statistics(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """Return statistics per reward: mean, std, min, max, and accuracy against the file's ranking.

    Each comparison has weight 1, whatever its number of completions. The longest-wins baseline is included.
    """
    scored_rows = [row for row in rows if row.scores]
    ranked_rows = [row for row in scored_rows if row.ranks is not None and len(set(row.ranks)) > 1]
    statistics: dict[str, Any] = {
        "rows": len(rows),
        "without_reply": len(rows) - len(scored_rows),
        "rewards": {},
    }
    for name in scored_rows[0].scores:
        values = np.asarray([value for row in scored_rows for value in row.scores[name]])
        moments = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
        reward_statistics = {key: float(value) for key, value in moments.items()} | {
            "completions": len(values)
        }
        agreement = _agreement(ranked_rows, [row.scores[name] for row in ranked_rows]) if ranked_rows else {}
        statistics["rewards"][name] = reward_statistics | agreement
    if ranked_rows:
        lengths = [
            [
                float(len(completion.reply.full_text if completion.reply else ""))
                for completion in row.preference.completions
            ]
            for row in ranked_rows
        ]
        statistics["rewards"][LENGTH_BASELINE] = _agreement(ranked_rows, lengths)
    return statistics


def _agreement(rows: Sequence[ScoredRow], values: Sequence[Sequence[float]]) -> dict[str, Any]:
    sizes = np.asarray([len(row_values) for row_values in values])
    ranks = np.asarray([rank for row in rows for rank in row.ranks or []], dtype=np.int32)
    flat_values = np.asarray([value for row_values in values for value in row_values])
    # Only margins are read, so that lengths may be zeros.
    pairs = pair_comparisons(
        ScoredComparisons(flat_values, ranks, np.zeros(len(flat_values), dtype=np.int64), sizes)
    )
    accuracy = pairs.positive_fraction(pairs.margins)
    return {
        "comparisons": len(rows),
        "accuracy": accuracy,
        "interval": list(wilson_interval(accuracy, len(rows))),
    }


def _conversations(preference: PreferenceRow) -> Iterator[list[Message]]:
    """Yield a row's conversations, one per completion; none if any of them ends without a reply."""
    if all(
        completion.reply is not None and not completion.reply.is_empty
        for completion in preference.completions
    ):
        for completion in preference.completions:
            assert completion.reply is not None
            yield [*completion.prompt, completion.reply]


def _read_unranked_responses(columns: Mapping[str, Any]) -> PreferenceRow:
    """Read the unranked completions of a prompt."""
    if not isinstance(columns["responses"], list) or not columns["responses"]:
        raise RowError("responses", "not a list, or empty", "a list of completions")
    prompt, completions = prompt_turns(columns, "prompt"), []
    for index, entry in enumerate(columns["responses"]):
        field = f"responses[{index}]"
        turns, reply = split_completion(prompt, completion_turns({field: entry}, field), field)
        completions.append(ScoredCompletion(tuple(with_context(columns, turns)), reply))
    return PreferenceRow(tuple(completions))


def _read_completion(columns: Mapping[str, Any]) -> PreferenceRow:
    """Read a prompt, which may be a dialogue, with one completion."""
    turns, reply = split_completion(
        prompt_turns(columns, "prompt"), completion_turns(columns, "completion"), "completion"
    )
    return PreferenceRow((ScoredCompletion(tuple(with_context(columns, turns)), reply),))


def _read_last_turn(layout: Layout[list[Message]], columns: Mapping[str, Any]) -> PreferenceRow:
    """Read a conversation with its last turn as the completion."""
    turns = layout.parse(columns)
    reply = turns[-1] if turns[-1].role in REPLY_ROLES else None
    return PreferenceRow((ScoredCompletion(tuple(turns[:-1] if reply else turns), reply),))


SCORABLE_LAYOUTS: Sequence[Layout[PreferenceRow]] = (
    *RANKINGS,
    Layout(
        "prompt/responses",
        ("prompt", "responses"),
        _read_unranked_responses,
        turns=("prompt",),
        lists=("responses",),
    ),
    Layout("prompt/completion", ("prompt", "completion"), _read_completion, turns=("prompt", "completion")),
    *(layout.with_parser(partial(_read_last_turn, layout)) for layout in CONVERSATION_LAYOUTS),
)
"""Comparisons first, then single completions in every instruction layout."""
