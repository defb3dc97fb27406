"""Published layouts of preference data, recognized by column names: pairs, ranked lists, votes, labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, nan

from align.preference.rows.fields import (
    READ_AS_TEXT,
    RowFields,
    completion_turns,
    get_member,
    is_contained,
    parse_label,
    parse_list,
    parse_number,
    parse_numbers,
    parse_vote,
    prompt_turns,
    response_text,
    split_completion,
)
from data_templates.segments import REPLY_ROLES, Message
from finetune.data.fields import RowError, checked_text, short_repr, text_field
from finetune.data.layouts import CONTEXT_COLUMNS, MEDIA, Layout, with_context
from finetune.data.turns import parse_turns

SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""Score columns of published pairs (UltraFeedback-binarized: the first)."""

ASPECT_MEAN_COLUMN = "fine-grained_score"
"""UltraFeedback's mean rating of a completion: helpfulness, honesty, instruction following, truthfulness."""

PAIR_COLUMNS = (*CONTEXT_COLUMNS, "margin", *(name for names in SCORE_COLUMNS for name in names))
VOTE_COLUMNS = tuple(f"annotator{number}" for number in range(1, 10))

PROMPT_REPLACED = "with a prompt column that is not in the dialogues, which are used"
LATER_TURNS_IGNORED = "with later questions, which are ignored: their context differs between completions"

Turns = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """One completion: its prompt turns, its reply (None if the dialogue ends without one), its score."""

    prompt: Turns
    reply: Message | None
    score: float = nan

    @property
    def scored(self) -> bool:
        return isfinite(self.score)


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """The completions of a row as read. ``ordered``: the row gives the order (chosen, rejected).

    ``margin``: the preference margin, if there is a column. ``notes``: deviations from the row as written,
    which the report counts.
    """

    completions: tuple[ScoredCompletion, ...]
    ordered: bool = False
    margin: float = nan
    notes: tuple[str, ...] = ()


def _empty_prompt(columns: RowFields) -> list[Message]:
    return []


def _instruction_prompt(columns: RowFields) -> list[Message]:
    context = text_field(columns, "input", optional=True)
    return [Message("user", text_field(columns, "instruction"), context=context)]


def _conversation_prompt(name: str) -> Callable[[RowFields], list[Message]]:
    return lambda columns: parse_turns(columns[name], name)


def _read_pair(read_prompt: Callable[[RowFields], list[Message]], columns: RowFields) -> PreferenceRow:
    prompt = read_prompt(columns)
    are_lists = [isinstance(columns[name], (list, dict)) for name in ("chosen", "rejected")]
    if are_lists[0] != are_lists[1]:
        types = [("text", "a list of turns")[is_list] for is_list in are_lists]
        raise RowError("rejected", f"{types[1]}, but chosen is {types[0]}", "the same type in both columns")
    completions = [
        ScoredCompletion(*_split_completion_column(prompt, columns, name), score)
        for name, score in zip(("chosen", "rejected"), _read_pair_scores(columns), strict=True)
    ]
    contained = all(is_contained(prompt, completion.prompt) for completion in completions)
    notes = () if contained else (PROMPT_REPLACED,)
    return PreferenceRow(tuple(completions), True, _read_margin(columns), notes)


def _read_margin(columns: RowFields) -> float:
    if columns.get("margin") is None:
        return nan
    expected = "a preference margin, 0 or more"
    margin = parse_number(columns["margin"], "margin", expected)
    if margin < 0:
        raise RowError("margin", f"found {margin:g}", expected)
    return margin


def _split_completion_column(
    prompt: list[Message], columns: RowFields, name: str
) -> tuple[tuple[Message, ...], Message | None]:
    turns, reply = split_completion(prompt, completion_turns(columns, name), name)
    return tuple(with_context(columns, turns)), reply


def _read_pair_scores(columns: RowFields) -> list[float]:
    for names in SCORE_COLUMNS:
        given = [columns.get(name) is not None for name in names]
        if all(given):
            return [parse_number(columns[name], name) for name in names]
        if any(given):
            # False sorts before True: the missing column comes first.
            missing, present = sorted(names, key=lambda name: columns.get(name) is not None)
            raise RowError(
                missing, f"missing or null, but {present} is given", "a score for both, or for none"
            )
    return [nan, nan]


def _read_ranked_responses(column: str, sign: float, columns: RowFields) -> PreferenceRow:
    shared_prompt, responses = prompt_turns(columns, "prompt"), parse_list(columns, "responses")
    scores = parse_numbers(columns[column], column, len(responses), "responses")
    completions = []
    for index, (entry, score) in enumerate(zip(responses, scores, strict=True)):
        field = f"responses[{index}]"
        prompt, reply = split_completion(shared_prompt, completion_turns({field: entry}, field), field)
        completions.append(ScoredCompletion(tuple(with_context(columns, prompt)), reply, sign * score))
    return PreferenceRow(tuple(completions))


def _read_scored_answers(columns: RowFields) -> PreferenceRow:
    prompt = tuple(with_context(columns, _instruction_prompt(columns)))
    completions = []
    for index, entry in enumerate(parse_list(columns, "answers")):
        field = f"answers[{index}]"
        text = checked_text(get_member(entry, "text", field), f"{field}.text")
        score = parse_number(get_member(entry, "score", field), f"{field}.score")
        completions.append(ScoredCompletion(prompt, Message("assistant", text), score))
    return PreferenceRow(tuple(completions))


def _read_ultrafeedback(columns: RowFields) -> PreferenceRow:
    """Return the completions with their mean rating over four aspects."""
    # Not ``overall_score``: some of its published 10s were 1s.
    prompt = tuple(with_context(columns, _instruction_prompt(columns)))
    completions = []
    for index, entry in enumerate(parse_list(columns, "completions")):
        field = f"completions[{index}]"
        text = checked_text(get_member(entry, "response", field), f"{field}.response")
        score = parse_number(get_member(entry, ASPECT_MEAN_COLUMN, field), f"{field}.{ASPECT_MEAN_COLUMN}")
        completions.append(ScoredCompletion(prompt, Message("assistant", text), score))
    return PreferenceRow(tuple(completions))


def _read_judge_scores(columns: RowFields) -> PreferenceRow:
    """Return the completions of the first question: later ones depend on each model's first answer."""
    questions = columns["questions"]
    if not isinstance(questions, list) or not questions:
        raise RowError("questions", f"found {short_repr(questions)}", "a list of questions")
    question = Message("user", checked_text(questions[0], "questions[0]"))
    prompt = tuple(with_context(columns, [question]))
    completions = []
    for index, entry in enumerate(parse_list(columns, "answers")):
        field = f"answers[{index}]"
        outputs, judge_scores = get_member(entry, "outputs", field), get_member(entry, "judge_scores", field)
        if not isinstance(outputs, list) or not outputs:
            raise RowError(
                f"{field}.outputs", f"found {short_repr(outputs)}", "a list of answers, one per question"
            )
        scores = parse_numbers(judge_scores, f"{field}.judge_scores", len(outputs), "outputs")
        reply = Message("assistant", checked_text(outputs[0], f"{field}.outputs[0]"))
        completions.append(ScoredCompletion(prompt, reply, scores[0]))
    return PreferenceRow(tuple(completions), notes=(LATER_TURNS_IGNORED,) if len(questions) > 1 else ())


def _read_votes(columns: RowFields) -> PreferenceRow:
    """Return two responses scored by their votes; no majority is a tie."""
    prompt = tuple(with_context(columns, _instruction_prompt(columns)))
    names = [name for name in VOTE_COLUMNS if columns.get(name) is not None]
    votes = [parse_vote(columns[name], name) for name in names]
    counts = [float(votes.count(choice)) for choice in (1, 2)]
    tie = votes.count(0) >= max(counts) or counts[0] == counts[1]
    completions = []
    for name, score in zip(("response1", "response2"), counts, strict=True):
        reply = Message("assistant", response_text(columns[name], name))
        completions.append(ScoredCompletion(prompt, reply, 0.0 if tie else score))
    are_texts = all(isinstance(columns[name], str) for name in ("response1", "response2"))
    return PreferenceRow(tuple(completions), notes=() if are_texts else (READ_AS_TEXT,))


def _read_labeled(
    read_prompt: Callable[[RowFields], list[Message]], completion_column: str | None, columns: RowFields
) -> PreferenceRow:
    """Return a completion with the score of its label: 1 (good) or 0 (bad)."""
    messages = with_context(columns, read_prompt(columns))
    conversation = (
        [*messages, *completion_turns(columns, completion_column)] if completion_column else messages
    )
    reply = conversation[-1] if conversation[-1].role in REPLY_ROLES else None
    prompt = tuple(conversation[:-1] if reply else conversation)
    return PreferenceRow((ScoredCompletion(prompt, reply, float(parse_label(columns["label"]))),))


def _prompt_column(name: str) -> Callable[[RowFields], list[Message]]:
    return lambda columns: prompt_turns(columns, name)


def _pairs(
    name: str, prompt: str, read_prompt: Callable[[RowFields], list[Message]]
) -> Layout[PreferenceRow]:
    turns = tuple(column for column in (prompt, "chosen", "rejected") if column not in ("", "instruction"))
    return Layout(
        name,
        tuple(filter(None, (prompt, "chosen", "rejected"))),
        partial(_read_pair, read_prompt),
        ("input", *PAIR_COLUMNS) if prompt == "instruction" else PAIR_COLUMNS,
        turns=turns,
        lists=tuple({"conversations", "messages"} & {prompt}),
        stops=MEDIA,
    )


PAIRS: Sequence[Layout[PreferenceRow]] = (
    _pairs("prompt/chosen/rejected", "prompt", _prompt_column("prompt")),
    _pairs("ShareGPT with ranking", "conversations", _conversation_prompt("conversations")),
    _pairs("messages with ranking", "messages", _conversation_prompt("messages")),
    _pairs("Alpaca with ranking", "instruction", _instruction_prompt),
    _pairs("question/chosen/rejected", "question", _prompt_column("question")),
    # Last, since all pairs have these columns; here both dialogues begin with the prompt.
    _pairs("chosen/rejected", "", _empty_prompt),
)
"""A chosen and a rejected completion; the first matching layout is used."""


def _ranked_responses(column: str, sign: float) -> Layout[PreferenceRow]:
    return Layout(
        f"prompt/responses/{column}",
        ("prompt", "responses", column),
        partial(_read_ranked_responses, column, sign),
        turns=("prompt",),
        lists=("responses", column),
        stops=MEDIA,
    )


INSTRUCTION_COLUMNS = ("input", *CONTEXT_COLUMNS)
RANKINGS: Sequence[Layout[PreferenceRow]] = (
    *PAIRS,
    _ranked_responses("scores", 1.0),
    # Rank 1 is the best: negated, a higher score is better.
    _ranked_responses("ranks", -1.0),
    Layout(
        "questions with judged answers",
        ("questions", "answers"),
        _read_judge_scores,
        lists=("questions", "answers"),
        members=(("answers", ("outputs", "judge_scores")),),
        stops=MEDIA,
    ),
    Layout(
        "instruction with scored answers",
        ("instruction", "answers"),
        _read_scored_answers,
        INSTRUCTION_COLUMNS,
        lists=("answers",),
        members=(("answers", ("text", "score")),),
        stops=MEDIA,
    ),
    Layout(
        "UltraFeedback",
        ("instruction", "completions"),
        _read_ultrafeedback,
        INSTRUCTION_COLUMNS,
        lists=("completions",),
        members=(("completions", ("response", ASPECT_MEAN_COLUMN)),),
        stops=MEDIA,
    ),
    Layout(
        "PandaLM votes",
        ("instruction", "response1", "response2", "annotator1"),
        _read_votes,
        (*INSTRUCTION_COLUMNS, *VOTE_COLUMNS[1:]),
        stops=MEDIA,
    ),
)
"""A prompt with two or more ranked completions; the first matching layout is used."""


def _labeled(name: str, *columns: str) -> Layout[PreferenceRow]:
    prompt, *completion = columns
    read_prompt = _prompt_column(prompt) if completion else _conversation_prompt(prompt)
    return Layout(
        name,
        (*columns, "label"),
        partial(_read_labeled, read_prompt, next(iter(completion), None)),
        turns=columns,
        lists=() if completion else columns,
        stops=MEDIA,
    )


LABELED: Sequence[Layout[PreferenceRow]] = (
    _labeled("messages with label", "messages"),
    _labeled("ShareGPT with label", "conversations"),
    _labeled("prompt/completion/label", "prompt", "completion"),
)
"""A prompt with one completion that is good or bad (KTO)."""
