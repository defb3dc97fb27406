"""``held_out.jsonl``: every graded completion of held-out prompts; the places of the held-out rows."""

import re
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from finetune.evaluation.small_samples import MeanChange, paired_change
from finetune.recipe.user_arguments import CompletionRow
from finetune.training.metric_specs import When
from finetune.training.run_directory import HELD_OUT, RunDirectory

ROW_NUMBER = re.compile(
    r"(?P<source>.*?)(?:(?::| |^)row |:\[|:)(?P<number>\d+)\]?(?P<rest>(?: of [\w.\[\]-]+)?)", re.DOTALL
)
"""``file.jsonl:12``, ``file.json:[12]``, ``file.parquet:row 12``, ``row 12``, ``row 12 of data.held_out``."""


def graded_entry(
    row: CompletionRow, *, ended_with_eos: bool, grades: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Return the entry of a completion: location, prompt, reference answer, completion, grades.

    Args:
        row: the completion.
        ended_with_eos: whether it ended with EOS.
        grades: grades by grader.
        more: further values, such as rewards.
    """
    entry = {"location": row.location, "prompt": row.prompt}
    if row.reference is not None:
        entry["expected"] = row.reference
    graded = {"grades": dict(grades)} if grades else {}
    return {**entry, "completion": row.completion, "ended_with_eos": bool(ended_with_eos), **graded, **more}


def write_graded(
    run: RunDirectory, evaluation: str, when: When, entries: Iterable[Mapping[str, Any]]
) -> None:
    """Write the graded completions of one evaluation; those of an earlier start are replaced.

    Args:
        run: the run directory.
        evaluation: ``graders``, ``exact_match``, ``retention``, ``classification`` or ``rewards``.
        when: before or after training.
        entries: from ``graded_entry``.
    """
    if not run.is_writer:
        return
    kept = [
        entry
        for entry in run.read_jsonl(HELD_OUT)
        if (entry["evaluation"], entry["when"]) != (evaluation, when)
    ]
    run.write_jsonl(
        HELD_OUT, [*kept, *({"evaluation": evaluation, "when": when, **entry} for entry in entries)]
    )


def reward_change(run: RunDirectory) -> MeanChange | None:
    """Return the change of the mean reward of held-out prompts; None for a run that does not record both.

    Completions of one prompt are not independent: a prompt counts with the mean of its completions.
    """
    rewards: dict[str, dict[str, list[float]]] = {"before": {}, "after": {}}
    for entry in run.read_jsonl(HELD_OUT):
        if entry["evaluation"] == "rewards":
            rewards[entry["when"]].setdefault(entry["location"], []).append(entry["reward"])
    locations = [location for location in rewards["before"] if location in rewards["after"]]
    if not locations:
        return None
    before, after = (
        [fmean(rewards[when][location]) for location in locations] for when in ("before", "after")
    )
    return paired_change(before, after)


def compact_locations(locations: Iterable[str]) -> dict[str, str]:
    """Return the locations of rows by source, consecutive numbers as a range.

    >>> compact_locations(["a.csv:3", "a.csv:4", "a.csv:5", "a.csv:9", "row 7"])
    {'a.csv': '3-5, 9', 'rows': '7'}
    """
    numbers: dict[str, set[int]] = {}
    for location in locations:
        match = ROW_NUMBER.fullmatch(location)
        source = f"{match['source']}{match['rest']}".strip() or "rows" if match else location
        numbers.setdefault(source, set()).update([int(match["number"])] if match else [])
    return {source: ", ".join(_ranges(sorted(values))) for source, values in sorted(numbers.items())}


def _ranges(numbers: list[int]) -> Iterable[str]:
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            first, last = numbers[start], numbers[end - 1]
            yield f"{first}-{last}" if last > first else str(first)
            start = end
