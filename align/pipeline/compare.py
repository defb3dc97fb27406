"""The same held-out prompts, answered by the model of every stage, and what the reward models say of it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.pipeline.directory import SAMPLES, PipelineDirectory
from align.pipeline.entry import Entry
from align.pipeline.plan import Pipeline
from align.reward.scorer import TOTAL, load_reward
from finetune.training.generate import reply_to
from finetune.training.result import Result
from finetune.training.samples import turns_of
from finetune.training.tuned import load_tuned

Lines = list[dict[str, Any]]


def compare(pipeline: Pipeline, folder: PipelineDirectory, results: Mapping[str, Result]) -> Lines:
    """Write samples.jsonl: a prompt of the last stage, every stage's reply to it, and each reply's rewards.

    What a stage's run says of its samples is taken from there: its own replies are those after training, and
    those before training are of the stage that it starts from. Only what no run says is generated.

    Returns:
        A line a prompt: ``prompt``, ``expected``, ``replies`` (stage -> text), ``rewards`` (stage of a reward
        model -> stage -> number).
    """
    writers = [entry for entry in pipeline.entries if not entry.scores and results[entry.name].samples]
    if not writers:
        return []
    shown = results[writers[-1].name].samples
    replies = {entry.name: _replies(entry, shown, pipeline, results) for entry in writers}
    judges = [entry.name for entry in pipeline.entries if entry.scores]
    rewards = {name: _rewards(results[name], shown, replies) for name in judges}
    lines: Lines = [
        {
            "prompt": sample["prompt"],
            "expected": sample.get("expected", ""),
            "replies": {name: texts[number] for name, texts in replies.items()},
            "rewards": {
                judge: {name: scores[number] for name, scores in found.items()}
                for judge, found in rewards.items()
            },
        }
        for number, sample in enumerate(shown)
    ]
    folder.write(SAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return lines


def _replies(entry: Entry, shown: Lines, pipeline: Pipeline, results: Mapping[str, Result]) -> list[str]:
    """Return a stage's replies: of its own run, of the run of a stage that starts from it, or new ones."""
    result = results[entry.name]
    said = {sample["prompt"]: sample["after"] for sample in result.samples}
    for other in pipeline.entries:
        if other.start == entry.name and not other.scores:
            before = {sample["prompt"]: sample["before"] for sample in results[other.name].samples}
            said = before | said
    missing = [sample for sample in shown if sample["prompt"] not in said]
    length = pipeline.recipes[entry.name].settings.evaluate.max_new_tokens
    replies = _generated(result, missing, length)
    said |= {sample["prompt"]: reply for sample, reply in zip(missing, replies, strict=True)}
    return [said[sample["prompt"]] for sample in shown]


def _generated(result: Result, missing: Lines, max_new_tokens: int) -> list[str]:
    """Return a run's greedy replies."""
    if not missing:
        return []
    tuned = load_tuned(result.directory)
    replies = reply_to(
        tuned.model,
        tuned.encoder,
        [turns_of(sample) for sample in missing],
        max_new_tokens=max_new_tokens,
        context=tuned.context,
    )
    return [reply.text for reply in replies]


def _rewards(result: Result, shown: Lines, replies: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
    """Return what a reward model says of every stage's replies."""
    model = load_reward(result.directory)
    prompts = [turns_of(sample) for sample in shown]
    return {name: model.score(prompts, texts)[TOTAL] for name, texts in replies.items()}
