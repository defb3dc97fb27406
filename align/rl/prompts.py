"""RL prompts: read, select, split off held-out prompts, tokenize, cache, report."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.preference.rows.prepare import split_by_prompt
from align.rl.prompt_layouts import PROMPTS
from align.rl.settings import PromptSettings
from data_templates._segments import REPLIES, Message, TemplateError
from finetune.data.conversation import Conversation, wishing
from finetune.data.dataset import SHOWN_FROM_TRAINING, cached
from finetune.data.gather import SELECTED, Place, count_copies, count_seen, places_of, ratings, read_place
from finetune.data.layouts import read_rows, recognise_among
from finetune.data.mixture import Part, mix
from finetune.data.report import DataReport, SourceReport
from finetune.data.selection import select
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.training.job import Job
from finetune.training.text import Text

FORMAT = 1
"""Cache format version. Increment it when the content of a cached file changes, so old files are ignored."""
SHORTEST = 8
"""Minimum number of positions for a prompt."""

REPAIR = "name the column of the prompt: data.columns={prompt: QUESTION_COLUMN}"
NO_QUESTION = "dropped: the prompt does not end with a user turn"
EMPTY_TURN = "dropped: empty turn in the prompt"
NO_TEMPLATE = "dropped: not valid for this template"
WRITTEN_APART = "contain template markers in their text (escaped)"

Turns = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt.

    Attributes:
        messages: the turns up to and including the last user turn, complete even if ``ids`` are truncated.
        ids: token ids up to the position where the completion starts.
        location: location of the row, ``file:line``.
        expected: the row's own reply (reference answer), if it has one.
        source_index: index of the source.
    """

    talk: Turns
    ids: tuple[int, ...]
    place: str
    expected: str | None
    source: int = 0


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of their rows."""

    rows: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        return self.rows[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each prompt."""
        return [len(row.ids) for row in self.rows]

    @property
    def places(self) -> list[str]:
        """Return the location of each prompt, ``file:line``."""
        return [row.place for row in self.rows]


@dataclass(frozen=True)
class PreparedPrompts:
    """Training prompts, held-out prompts and the data report."""

    train: Prompts
    held_out: Prompts | None
    report: DataReport

    @property
    def conversations(self) -> list[Conversation]:
        """Return the conversations for samples and graders: held-out prompts, else some training prompts.

        Each row appears once, and ends with its own reply (empty if it has none).
        """
        rows = self.train.rows[:SHOWN_FROM_TRAINING] if self.held_out is None else self.held_out.rows
        once = {row.place: row for row in rows}.values()
        return [
            Conversation([*row.talk, Message("assistant", row.expected or "")], row.place, row.source)
            for row in once
        ]


@dataclass(frozen=True, slots=True)
class Asked:
    """A row before tokenization: the turns up to the completion, and the row's own reply if it has one."""

    prompt: Turns
    expected: str | None
    where: str
    source: int

    @property
    def words(self) -> object:
        """Return the key by which duplicate prompts are found: role, content and context of each turn."""
        return tuple((turn.role, turn.content, turn.context) for turn in self.prompt)


def load_prompts(job: Job, settings: PromptSettings, text: Text, *, room: int) -> PreparedPrompts:
    """Read and tokenize a recipe's prompts, and log the data report.

    Args:
        ctx: the run context.
        settings: the recipe's data section.
        text: template and tokenizer.
        max_new_tokens: maximum number of completion tokens, reserved after every prompt.

    Raises:
        UserError: prompt and completion exceed the context length, or the data are invalid.
    """
    length = job.choose("data.max_prompt_length", longest_prompt(settings, text, room=room))
    with job.timed("data"):
        seed = job.recipe.settings.train.seed
        data = prepare_prompts(settings, text.encoder, max_prompt_length=length, seed=seed)
    for line in data.report.lines():
        job.say(line)
    return data


def longest_prompt(settings: PromptSettings, text: Text, *, room: int) -> tuple[int, str]:
    """Return the maximum number of prompt tokens, and the reason for it.

    Raises:
        UserError: a prompt plus ``max_new_tokens`` completion tokens exceeds the model's context length.
    """
    asked, free = settings.max_prompt_length, text.context - room
    if free < SHORTEST:
        found = f"{room} of a context length of {text.context}"
        expected = f"at most {text.context - SHORTEST}, to leave room for a prompt"
        raise UserError(Problem("sampling.max_new_tokens", found, expected))
    if asked is None:
        return max(SHORTEST, text.max_length - room), f"{room} tokens are reserved for the completion"
    if asked > free:
        found = f"{asked}, plus up to {room} completion tokens"
        expected = f"at most {free}: the context length is {text.context}"
        raise UserError(Problem("data.max_prompt_length", found, expected, f"data.max_prompt_length={free}"))
    return asked, "as requested"


def prepare_prompts(
    settings: PromptSettings, encoder: Encoder, *, max_prompt_length: int, seed: int
) -> PreparedPrompts:
    """Read, split and tokenize the prompts of a data section.

    Args:
        settings: the recipe's data section.
        encoder: template and tokenizer.
        max_prompt_length: maximum number of prompt tokens.
        seed: of the held-out split and of mixture sampling.

    Raises:
        UserError: a source cannot be read, rows do not fit its layout, or no prompt is left.
    """
    report, aside = DataReport(prompts=True), DataReport(prompts=True)
    rows, apart = _gather(settings, seed, report, aside)
    train = _tokenise(rows, encoder, settings, max_prompt_length, report)
    _refuse_none("data.source", "to answer", train, report)
    held_out = None
    if settings.held_out:
        held_out = _tokenise(apart, encoder, settings, max_prompt_length, aside)
        _refuse_none("data.held_out", "to measure on", held_out, aside)
        report.held_out = len(held_out)
    report.counts |= {f"held out: {what}": number for what, number in aside.counts.items()}
    report.examples |= {f"held out: {what}": where for what, where in aside.examples.items()}
    _tell(train, report)
    return PreparedPrompts(train, held_out, report)


def _gather(
    settings: PromptSettings, seed: int, report: DataReport, aside: DataReport
) -> tuple[list[Asked], list[Asked]]:
    """Return training and held-out prompts; the reports count dropped rows."""
    places = enumerate(places_of(settings))
    parts = [_part(place, index, seed, report) for index, place in places]
    report.sources = [part.report for part in parts]
    report.layout = " + ".join(dict.fromkeys(source.layout for source in report.sources))
    # By prompt, not by row: copies of a prompt would leak into the held-out split.
    if settings.mix is None:
        train, held_out = split_by_prompt(parts[0].rows, settings.held_out, seed)
    else:
        train, held_out = mix(parts, settings, seed=seed, report=report)
    if isinstance(settings.held_out, str):
        place = Place("data.held_out", settings.held_out, settings.split, None, settings.columns)
        held_out = _part(place, 0, seed, aside).rows
    count_copies([row for part in parts for row in part.rows], report)
    count_seen(held_out, train, aside)
    return train, held_out


def _part(place: Place, index: int, seed: int, report: DataReport) -> Part[Asked]:
    """Return the prompts of a source.

    Raises:
        UserError: the source cannot be read, its rows match no layout, or no row has a prompt.
    """
    found = read_place(place, index, seed)
    layout = recognise_among(
        list(found[0].columns), PROMPTS, columns=place.columns, where=place.name, repair=REPAIR
    )
    talks = read_rows(found, layout, place.columns)
    column = place.select.score if place.select else None
    scores = (
        [0.0] * len(found) if column is None else ratings(found, column, where=f"{place.key}.select.score")
    )
    rows = [
        Conversation(talk, row.where, index, score)
        for talk, row, score in zip(talks, found, scores, strict=True)
    ]
    if place.select is not None:
        random = np.random.default_rng([seed, index, SELECTED])
        rows = select(rows, place.select, random=random, report=report)
    asked = _asked(rows, report)
    if not asked:
        told = f"nothing to answer: {'; '.join(report.lines()[1:])}"
        repair = f"check the rows above, or {'select more rows' if place.select else REPAIR}"
        raise UserError(Problem(place.key, told, "rows with a user turn", repair))
    return Part(SourceReport(place.name, layout.name, found=len(found), usable=len(asked)), asked)


def _asked(rows: Sequence[Conversation], report: DataReport) -> list[Asked]:
    """Split rows into prompt and final reply; rows without a prompt are dropped and counted."""
    kept = []
    for row in rows:
        prompt, expected = list(row.messages), None
        while prompt and prompt[-1].role in REPLIES:
            expected = prompt.pop().content
        if not prompt or prompt[-1].role not in ("user", "observation"):
            report.count(NO_QUESTION, row.where)
        elif any(not turn.content.strip() for turn in prompt):
            report.count(EMPTY_TURN, row.where)
        else:
            kept.append(Asked(tuple(prompt), expected or None, row.where, row.source))
    return kept


def _tokenise(
    rows: Sequence[Asked], encoder: Encoder, settings: PromptSettings, longest: int, report: DataReport
) -> Prompts:
    """Tokenize prompts as ``chat`` does, or load them from the cache."""
    drop = settings.too_long == "drop"

    def encode(found: DataReport) -> dict[str, np.ndarray]:
        return _encode(rows, encoder, longest, drop, found)

    key = _cache_key(rows, encoder, longest, drop)
    arrays = cached(key, encode, cache=settings.cache, report=report)
    ids = np.split(arrays["input_ids"], arrays["starts"][1:-1])
    kept = [rows[number] for number in arrays["numbers"]]
    return Prompts(
        tuple(
            Prompt(row.prompt, tuple(own.tolist()), row.where, row.expected, row.source)
            for row, own in zip(kept, ids, strict=False)  # np.split of nothing returns one piece
        )
    )


def _encode(
    rows: Sequence[Asked], encoder: Encoder, longest: int, drop: bool, report: DataReport
) -> dict[str, np.ndarray]:
    flat: list[int] = []
    starts, numbers = [0], []
    # A policy trained with control tokens (chain of hindsight) expects its suffix in every prompt.
    asked = [wishing(row.prompt, encoder.wish) for row in rows]
    for number, encoded in enumerate(encoder.encode_many(asked)):
        where = rows[number].where
        if isinstance(encoded, TemplateError):
            report.count(NO_TEMPLATE, f"{where}: {encoded}")
            continue
        ids = encoded.input_ids
        if len(ids) > longest:
            report.count(f"longer than {longest} tokens, {'dropped' if drop else 'truncated'}", where)
            report.too_long += 1
            report.lost_tokens += len(ids) - (0 if drop else longest)
            if drop:
                continue
            # Truncate from the left, so that the user's last turn survives, and keep BOS.
            head = int(ids[:1] == [encoder.tokenizer.bos_token_id])
            ids = ids[:head] + ids[len(ids) - longest + head :]
        if encoded.written_apart:
            report.count(WRITTEN_APART, where)
        flat += ids
        starts.append(len(flat))
        numbers.append(number)
    return {
        "input_ids": np.asarray(flat, dtype=np.int32),
        "starts": np.asarray(starts, dtype=np.int64),
        "numbers": np.asarray(numbers, dtype=np.int64),
    }


def _cache_key(rows: Sequence[Asked], encoder: Encoder, longest: int, drop: bool) -> str:
    head = ["prompts", FORMAT, encoder.fingerprint(), encoder.wish, longest, drop]
    # Everything that determines the token ids, so that a change of it gives another file.
    digest = hashlib.sha256(json.dumps(head).encode())
    for row in rows:
        digest.update(json.dumps([row.where, row.words], ensure_ascii=False).encode())
    return digest.hexdigest()


def _refuse_none(where: str, purpose: str, prompts: Prompts, report: DataReport) -> None:
    if not len(prompts):
        found = f"nothing {purpose}: {'; '.join(report.lines()[1:])}"
        remedy = "data.too_long=cut" if report.too_long else "choose another data.template"
        raise UserError(Problem(where, found, "prompts", f"check the rows above, or {remedy}"))


def _tell(prompts: Prompts, report: DataReport) -> None:
    """Add row and token counts to the report, in total and per source."""
    lengths, sources = np.asarray(prompts.lengths), np.asarray([row.source for row in prompts])
    report.rows, report.tokens, report.longest = len(prompts), int(lengths.sum()), int(lengths.max())
    for number, source in enumerate(report.sources):
        source.rows, source.tokens = int((sources == number).sum()), int(lengths[sources == number].sum())
