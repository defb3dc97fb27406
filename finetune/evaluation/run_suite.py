"""Run a suite: ask a model every item, through the cache of answers, and score what it answers."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from data_templates.segments import Message
from finetune.evaluation.answer_cache import AnswerCache, digest
from finetune.evaluation.answers import ChoiceAnswer, CompletionAnswer, EvalModel, Sampling, TextAnswer
from finetune.evaluation.intervals import suite_estimates
from finetune.evaluation.items import SCORE, EvalItem, ItemResult
from finetune.evaluation.results import SuiteResult
from finetune.evaluation.suites import NamedSuite, Suite
from finetune.graders.loading import load_grader
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.user_arguments import CompletionRow, RowFunction
from finetune.recipe.user_function import call_for_grades, call_user_function

ITEMS_PER_WINDOW = 64
"""Items that are sorted by length, answered and stored at once: what a kill loses at most."""
Answer = ChoiceAnswer | CompletionAnswer | TextAnswer
ANSWERS = (ChoiceAnswer, CompletionAnswer, TextAnswer)
Progress = Callable[[str, int, int], None]
"""Receives the suite's name, the items that are done, and all items."""
PROMPT_CHARACTERS = 2000
"""Characters of a prompt that results keep."""


def run_suite(
    suite: NamedSuite,
    items: Sequence[EvalItem],
    model: EvalModel,
    cache: AnswerCache | None,
    *,
    progress: Progress = lambda suite, done, total: None,
) -> SuiteResult:
    """Return a model's results on the items of a suite.

    Args:
        suite: the suite.
        items: from ``read_items``, or a part of them.
        model: the model.
        cache: its answers; None for a model that changes.
        progress: called after each window of items.

    Raises:
        UserError: an item fits neither template nor task, or a grader raised.
    """
    start = time.monotonic()
    settings = suite.settings
    _check_items(suite, items)
    answers = answer_items(suite, items, model, cache, progress)
    values = _item_values(suite, items, answers)
    results = [
        ItemResult(item.id, item.cluster or item.id, item.group, item_values, _evidence(item, answer))
        for item, answer, item_values in zip(items, answers, values, strict=True)
    ]
    metrics, groups = suite_estimates(suite.metrics, results)
    return SuiteResult(
        suite=suite.name,
        settings=settings.model_dump(mode="json"),
        fingerprint=suite_fingerprint(settings, items),
        items=results,
        metrics=metrics,
        groups=groups,
        seconds=round(time.monotonic() - start, 2),
        notes=_notes(results),
    )


def suite_fingerprint(settings: Suite, items: Sequence[EvalItem]) -> str:
    """Return a digest of what decides the scores besides the model: results of equal ones are comparable."""
    content = [[item.id, _turns(item.prompt), item.reference, item.choices, item.correct] for item in items]
    rules = settings.model_dump(mode="json", exclude={"description", "data", "purpose", "limit"})
    return digest([rules, content])[:16]


def _check_items(suite: NamedSuite, items: Sequence[EvalItem]) -> None:
    task = suite.settings.task
    for item in items:
        if task == "choice" and (len(item.choices) < 2 or not item.correct):
            actual, expected = f"item {item.id} has no choices", "two or more choices, one of them correct"
        elif task == "perplexity" and not item.reference:
            actual, expected = f"item {item.id} has no text", "a text to read"
        elif task == "completion" and not item.prompt:
            actual, expected = f"item {item.id} has no prompt", "a prompt"
        else:
            continue
        raise UserError(Problem(f"{suite.path}", actual, expected, "check data.layout and data.columns"))


def answer_items(
    suite: NamedSuite,
    items: Sequence[EvalItem],
    model: EvalModel,
    cache: AnswerCache | None,
    progress: Progress,
) -> list[Any]:
    """Return the answer to each item, of the type of the suite's task; see ``run_suite``."""
    settings = suite.settings
    questions = [_question(settings, item, number) for number, item in enumerate(items)]
    done = 0 if cache is None else len(items) - cache.count_missing(questions)
    progress(suite.name, done, len(items))

    def ask(indices: Sequence[int]) -> list[dict[str, Any]]:
        nonlocal done
        asked = [items[index] for index in indices]
        answers: Sequence[Answer]
        if settings.task == "choice":
            answers = model.choose([(item.prompt, item.choices) for item in asked], style=settings.style)
        elif settings.task == "perplexity" and items[0].prompt:
            replies = [(item.prompt, [item.reference or ""]) for item in asked]
            answers = model.choose(replies, style=settings.style)
        elif settings.task == "perplexity":
            answers = model.read([item.reference or "" for item in asked])
        else:
            streams = list(indices) if settings.temperature > 0 else [0] * len(indices)
            sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.seed, streams)
            answers = model.complete([item.prompt for item in asked], sampling)
        done += len(indices)
        progress(suite.name, min(done, len(items)), len(items))
        return [asdict(answer) for answer in answers]

    if cache is None:
        return [_from_json(answer) for answer in ask(range(len(items)))]
    return [_from_json(answer) for answer in cache.answers(questions, ask, window=ITEMS_PER_WINDOW)]


def _question(settings: Suite, item: EvalItem, number: int) -> dict[str, Any]:
    """Return what decides an answer besides the model."""
    if settings.task == "choice":
        return {"choose": [_turns(item.prompt), item.choices], "style": settings.style}
    if settings.task == "perplexity" and item.prompt:
        return {"choose": [_turns(item.prompt), [item.reference]], "style": settings.style}
    if settings.task == "perplexity":
        return {"read": item.reference}
    question = {"complete": _turns(item.prompt), "max_new_tokens": settings.max_new_tokens}
    if settings.temperature > 0:
        question |= {"temperature": settings.temperature, "seed": settings.seed, "stream": number}
    return question


def _turns(prompt: Sequence[Message]) -> list[list[str]]:
    return [[turn.role, turn.content, turn.context] for turn in prompt]


def _from_json(answer: Mapping[str, Any]) -> Answer:
    """Return the answer that has these fields."""
    kind: Any = next(kind for kind in ANSWERS if answer.keys() == {field.name for field in fields(kind)})
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in answer.items()}
    typed: Answer = kind(**values)
    return typed


def _item_values(
    suite: NamedSuite, items: Sequence[EvalItem], answers: Sequence[Answer]
) -> list[dict[str, float]]:
    """Return the values of each item's answer, the score among them."""
    settings = suite.settings
    grades: Sequence[float | None] = [None] * len(items)
    if settings.grader is not None:
        grader = load_grader(settings.grader, settings.grader_options, where=f"{suite.path}: grader")
        grades = _grades(grader, items, answers, where=f"{suite.path}: grader")
    values = []
    for item, answer, grade in zip(items, answers, grades, strict=True):
        own = _answer_values(settings, item, answer)
        if grade is not None:
            own[SCORE] = grade
        if suite.item_values is not None:
            own |= suite.item_values(item, answer)
        values.append(own)
    return values


def _answer_values(settings: Suite, item: EvalItem, answer: Answer) -> dict[str, float]:
    if isinstance(answer, ChoiceAnswer) and settings.task == "perplexity":
        return {"logp": answer.logps[0], "bytes": answer.num_bytes[0]}
    if isinstance(answer, ChoiceAnswer):
        return {
            SCORE: float(answer.chosen in item.correct),
            "score_per_byte": float(answer.chosen_per_byte in item.correct),
        }
    if isinstance(answer, TextAnswer):
        return {"logp": answer.logp, "tokens": answer.num_tokens, "bytes": answer.num_bytes}
    return {"ended": float(answer.ended_with_eos)}


def _grades(
    grader: RowFunction, items: Sequence[EvalItem], answers: Sequence[Answer], *, where: str
) -> list[float | None]:
    rows = [
        CompletionRow(
            prompt=item.prompt[-1].content,
            completion=answer.text,
            reference=item.reference,
            location=item.id,
            columns_by_location={item.id: item.columns},
            turns=item.prompt,
        )
        for item, answer in zip(items, answers, strict=True)
        if isinstance(answer, CompletionAnswer)
    ]
    if grader.is_batch:
        return call_for_grades(lambda: grader.call_batch(rows), len(rows), where=where)
    return [
        call_user_function(lambda *_, row=row: grader.call(row), row.prompt, row.completion, where=where)
        for row in rows
    ]


def _evidence(item: EvalItem, answer: Answer) -> dict[str, Any]:
    prompt = "\n".join(f"{turn.full_text}\n{turn.context}".strip() for turn in item.prompt)
    evidence: dict[str, Any] = {"prompt": prompt[:PROMPT_CHARACTERS]}
    if isinstance(answer, ChoiceAnswer) and item.choices:
        logps = [round(logp, 4) for logp in answer.logps]
        return evidence | {
            "choices": list(item.choices),
            "correct": list(item.correct),
            "chosen": answer.chosen,
            "logps": logps,
        }
    if not isinstance(answer, CompletionAnswer):
        return evidence | {"expected": (item.reference or "")[:PROMPT_CHARACTERS]}
    if item.reference is not None:
        evidence["expected"] = item.reference
    return evidence | {"completion": answer.text, "ended_with_eos": answer.ended_with_eos}


def _notes(results: Sequence[ItemResult]) -> list[str]:
    cut = sum(result.evidence.get("ended_with_eos") is False for result in results)
    if not cut:
        return []
    return [f"{cut:,} of {len(results):,} completions reached max_new_tokens and are cut off"]
