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
    parse_label,
    parse_list,
    parse_number,
    parse_numbers,
    parse_turns,
    parse_vote,
    prepend_system,
    prompt_turns,
    response_text,
    split_completion,
)
from data_templates.segments import REPLY_ROLES, Message
from finetune.data.layouts import Layout, RowError, checked_text, short_repr, system_turn, text_field

SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""Score columns of published pairs (UltraFeedback-binarized: the first)."""

ASPECT_MEAN_COLUMN = "fine-grained_score"
"""UltraFeedback's mean rating of a completion: helpfulness, honesty, instruction following, truthfulness."""

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
    return [*system_turn(columns), Message("user", text_field(columns, "instruction"), context=context)]


def _conversation_prompt(name: str) -> Callable[[RowFields], list[Message]]:
    return lambda columns: prepend_system(columns, parse_turns(columns, name))


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
    return PreferenceRow(tuple(completions), True, _read_margin(columns))


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
    return tuple(prepend_system(columns, turns)), reply


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
        completions.append(ScoredCompletion(tuple(prompt), reply, sign * score))
    return PreferenceRow(tuple(completions))


def _read_scored_answers(columns: RowFields) -> PreferenceRow:
    prompt = tuple(_instruction_prompt(columns))
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
    prompt = tuple(_instruction_prompt(columns))
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
    prompt = (Message("user", checked_text(questions[0], "questions[0]")),)
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
    prompt = tuple(_instruction_prompt(columns))
    names = [name for name in columns if name.startswith("annotator") and columns[name] is not None]
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
    messages = read_prompt(columns)
    conversation = (
        [*messages, *completion_turns(columns, completion_column)] if completion_column else messages
    )
    reply = conversation[-1] if conversation[-1].role in REPLY_ROLES else None
    prompt = tuple(conversation[:-1] if reply else conversation)
    return PreferenceRow((ScoredCompletion(prompt, reply, float(parse_label(columns["label"]))),))


def _prompt_column(name: str) -> Callable[[RowFields], list[Message]]:
    return lambda columns: prompt_turns(columns, name)


PAIRS: Sequence[Layout[PreferenceRow]] = (
    Layout(
        "prompt/chosen/rejected",
        ("prompt", "chosen", "rejected"),
        partial(_read_pair, _prompt_column("prompt")),
    ),
    Layout(
        "ShareGPT with ranking",
        ("conversations", "chosen", "rejected"),
        partial(_read_pair, _conversation_prompt("conversations")),
    ),
    Layout(
        "messages with ranking",
        ("messages", "chosen", "rejected"),
        partial(_read_pair, _conversation_prompt("messages")),
    ),
    Layout(
        "Alpaca with ranking", ("instruction", "chosen", "rejected"), partial(_read_pair, _instruction_prompt)
    ),
    Layout(
        "question/chosen/rejected",
        ("question", "chosen", "rejected"),
        partial(_read_pair, _prompt_column("question")),
    ),
    # Last, since all pairs have these columns; here both dialogues begin with the prompt.
    Layout("chosen/rejected", ("chosen", "rejected"), partial(_read_pair, _empty_prompt)),
)
"""A chosen and a rejected completion; the first matching layout is used."""

RANKINGS: Sequence[Layout[PreferenceRow]] = (
    *PAIRS,
    Layout(
        "prompt/responses/scores",
        ("prompt", "responses", "scores"),
        partial(_read_ranked_responses, "scores", 1.0),
    ),
    Layout(
        "prompt/responses/ranks",
        ("prompt", "responses", "ranks"),
        # Rank 1 is the best: negated, a higher score is better.
        partial(_read_ranked_responses, "ranks", -1.0),
    ),
    Layout("questions with judged answers", ("questions", "answers"), _read_judge_scores),
    Layout("instruction with scored answers", ("instruction", "answers"), _read_scored_answers),
    Layout("UltraFeedback", ("instruction", "completions"), _read_ultrafeedback),
    Layout("PandaLM votes", ("instruction", "response1", "response2", "annotator1"), _read_votes),
)
"""A prompt with two or more ranked completions; the first matching layout is used."""

LABELED: Sequence[Layout[PreferenceRow]] = (
    Layout(
        "messages with label",
        ("messages", "label"),
        partial(_read_labeled, _conversation_prompt("messages"), None),
    ),
    Layout(
        "ShareGPT with label",
        ("conversations", "label"),
        partial(_read_labeled, _conversation_prompt("conversations"), None),
    ),
    Layout(
        "prompt/completion/label",
        ("prompt", "completion", "label"),
        partial(_read_labeled, _prompt_column("prompt"), "completion"),
    ),
)
"""A prompt with one completion that is good or bad (KTO)."""
