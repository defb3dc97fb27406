"""Published layouts of preference data, recognized by column names: pairs, ranked lists, votes, labels."""

from collections.abc import Callable, Sequence
from functools import partial
from math import nan

from align.preference.rows.fields import (
    WRITTEN,
    Columns,
    completion,
    label,
    listed,
    member,
    number,
    numbers,
    question,
    turns,
    vote,
    whole,
    with_system,
    written,
)
from align.preference.rows.judged import Answer, Judged
from data_templates._segments import REPLIES, Message
from finetune.data.layouts import Layout, RowProblem, checked_text, short, system_turn, text_field

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""Score columns of published pairs (UltraFeedback-binarized: the first)."""

ASPECTS = "fine-grained_score"
"""UltraFeedback's mean rating of a completion: helpfulness, honesty, instruction following, truthfulness."""

LATER_TURNS = "with later questions, which are ignored: their context differs between completions"


def _nothing(columns: Columns) -> list[Message]:
    return []


def _instruction(columns: Columns) -> list[Message]:
    context = text_field(columns, "input", optional=True)
    return [*system_turn(columns), Message("user", text_field(columns, "instruction"), context=context)]


def _conversation(name: str) -> Callable[[Columns], list[Message]]:
    return lambda columns: with_system(columns, turns(columns, name))


def _pair(ask: Callable[[Columns], list[Message]], columns: Columns) -> Judged:
    asked = ask(columns)
    lists = [isinstance(columns[name], (list, dict)) for name in ("chosen", "rejected")]
    if lists[0] != lists[1]:
        kinds = [("text", "a list of turns")[kind] for kind in lists]
        raise RowProblem("rejected", f"{kinds[1]}, but chosen is {kinds[0]}", "the same type in both columns")
    answers = [
        Answer(*_whole(asked, columns, name), score)
        for name, score in zip(("chosen", "rejected"), _pair_scores(columns), strict=True)
    ]
    return Judged(tuple(answers), True, _margin(columns))


def _margin(columns: Columns) -> float:
    if columns.get("margin") is None:
        return nan
    expected = "a preference margin, 0 or more"
    margin = number(columns["margin"], "margin", expected)
    if margin < 0:
        raise RowProblem("margin", f"found {margin:g}", expected)
    return margin


def _whole(asked: list[Message], columns: Columns, name: str) -> tuple[tuple[Message, ...], Message | None]:
    turns, reply = whole(asked, completion(columns, name), name)
    return tuple(with_system(columns, turns)), reply


def _pair_scores(columns: Columns) -> list[float]:
    for names in SCORES:
        there = [columns.get(name) is not None for name in names]
        if all(there):
            return [number(columns[name], name) for name in names]
        if any(there):
            missing, found = sorted(names, key=lambda name: columns.get(name) is not None)
            raise RowProblem(
                missing, f"missing or null, but {found} is given", "a score for both, or for none"
            )
    return [nan, nan]


def _responses(better: str, sign: float, columns: Columns) -> Judged:
    asked, found = question(columns, "prompt"), listed(columns, "responses")
    scores = numbers(columns[better], better, len(found), "responses")
    answers = []
    for index, (entry, score) in enumerate(zip(found, scores, strict=True)):
        field = f"responses[{index}]"
        prompt, reply = whole(asked, completion({field: entry}, field), field)
        answers.append(Answer(tuple(prompt), reply, sign * score))
    return Judged(tuple(answers))


def _scored_answers(columns: Columns) -> Judged:
    asked = tuple(_instruction(columns))
    answers = []
    for index, entry in enumerate(listed(columns, "answers")):
        field = f"answers[{index}]"
        text = checked_text(member(entry, "text", field), f"{field}.text")
        score = number(member(entry, "score", field), f"{field}.score")
        answers.append(Answer(asked, Message("assistant", text), score))
    return Judged(tuple(answers))


def _ultrafeedback(columns: Columns) -> Judged:
    """Return the completions with their mean rating over four aspects."""
    # Not ``overall_score``: some of its published 10s were 1s.
    asked = tuple(_instruction(columns))
    answers = []
    for index, entry in enumerate(listed(columns, "completions")):
        field = f"completions[{index}]"
        text = checked_text(member(entry, "response", field), f"{field}.response")
        score = number(member(entry, ASPECTS, field), f"{field}.{ASPECTS}")
        answers.append(Answer(asked, Message("assistant", text), score))
    return Judged(tuple(answers))


def _judge_scores(columns: Columns) -> Judged:
    """Return the completions of the first question: later ones depend on each model's first answer."""
    questions = columns["questions"]
    if not isinstance(questions, list) or not questions:
        raise RowProblem("questions", f"found {short(questions)}", "a list of questions")
    asked = (Message("user", checked_text(questions[0], "questions[0]")),)
    answers = []
    for index, entry in enumerate(listed(columns, "answers")):
        field = f"answers[{index}]"
        said, judged = member(entry, "outputs", field), member(entry, "judge_scores", field)
        if not isinstance(said, list) or not said:
            raise RowProblem(
                f"{field}.outputs", f"found {short(said)}", "a list of answers, one per question"
            )
        scores = numbers(judged, f"{field}.judge_scores", len(said), "outputs")
        reply = Message("assistant", checked_text(said[0], f"{field}.outputs[0]"))
        answers.append(Answer(asked, reply, scores[0]))
    return Judged(tuple(answers), notes=(LATER_TURNS,) if len(questions) > 1 else ())


def _votes(columns: Columns) -> Judged:
    """Return two responses scored by their votes; no majority is a tie."""
    asked = tuple(_instruction(columns))
    names = [name for name in columns if name.startswith("annotator") and columns[name] is not None]
    votes = [vote(columns[name], name) for name in names]
    counts = [float(votes.count(number)) for number in (1, 2)]
    tie = votes.count(0) >= max(counts) or counts[0] == counts[1]
    answers = []
    for name, score in zip(("response1", "response2"), counts, strict=True):
        reply = Message("assistant", written(columns[name], name))
        answers.append(Answer(asked, reply, 0.0 if tie else score))
    texts = all(isinstance(columns[name], str) for name in ("response1", "response2"))
    return Judged(tuple(answers), notes=() if texts else (WRITTEN,))


def _labelled(ask: Callable[[Columns], list[Message]], said: str | None, columns: Columns) -> Judged:
    """Return a completion with the score of its label: 1 (good) or 0 (bad)."""
    messages = ask(columns)
    every = [*messages, *completion(columns, said)] if said else messages
    reply = every[-1] if every[-1].role in REPLIES else None
    prompt = tuple(every[:-1] if reply else every)
    return Judged((Answer(prompt, reply, float(label(columns["label"]))),))


def _asks(name: str) -> Callable[[Columns], list[Message]]:
    return lambda columns: question(columns, name)


PAIRS: Sequence[Layout[Judged]] = (
    Layout("prompt/chosen/rejected", ("prompt", "chosen", "rejected"), partial(_pair, _asks("prompt"))),
    Layout(
        "ShareGPT with ranking",
        ("conversations", "chosen", "rejected"),
        partial(_pair, _conversation("conversations")),
    ),
    Layout(
        "messages with ranking", ("messages", "chosen", "rejected"), partial(_pair, _conversation("messages"))
    ),
    Layout("Alpaca with ranking", ("instruction", "chosen", "rejected"), partial(_pair, _instruction)),
    Layout("question/chosen/rejected", ("question", "chosen", "rejected"), partial(_pair, _asks("question"))),
    Layout("chosen/rejected", ("chosen", "rejected"), partial(_pair, _nothing)),
)
"""A chosen and a rejected completion; the first matching layout is used."""

RANKINGS: Sequence[Layout[Judged]] = (
    *PAIRS,
    Layout("prompt/responses/scores", ("prompt", "responses", "scores"), partial(_responses, "scores", 1.0)),
    Layout("prompt/responses/ranks", ("prompt", "responses", "ranks"), partial(_responses, "ranks", -1.0)),
    Layout("questions with judged answers", ("questions", "answers"), _judge_scores),
    Layout("instruction with scored answers", ("instruction", "answers"), _scored_answers),
    Layout("UltraFeedback", ("instruction", "completions"), _ultrafeedback),
    Layout("PandaLM votes", ("instruction", "response1", "response2", "annotator1"), _votes),
)
"""A prompt with two or more ranked completions; the first matching layout is used."""

LABELLED: Sequence[Layout[Judged]] = (
    Layout("messages with label", ("messages", "label"), partial(_labelled, _conversation("messages"), None)),
    Layout(
        "ShareGPT with label",
        ("conversations", "label"),
        partial(_labelled, _conversation("conversations"), None),
    ),
    Layout(
        "prompt/completion/label",
        ("prompt", "completion", "label"),
        partial(_labelled, _asks("prompt"), "completion"),
    ),
)
"""A prompt with one completion that is good or bad (KTO)."""
