"""samples.jsonl: completions before and after training, side by side, and the exact-match rate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_templates._segments import REPLIES, Message
from finetune.training.generate import Reply
from finetune.training.run_directory import SAMPLES, RunDirectory

Answer = Callable[[Sequence[Sequence[Message]]], list[Reply]]


@dataclass(frozen=True)
class Samples:
    """Conversations with their expected replies; the first ``num_shown`` are written, all are scored."""

    conversations: list[list[Message]]
    shown: int
    scored: bool

    def before(self, run: RunDirectory, answer: Answer) -> None:
        """Generate with the untrained model; skipped if a resumed run has done so."""
        if not self.conversations or run.samples():
            return
        replies = answer(self._questions())
        self._score(run, "before", replies)
        lines = [self._line(i) | {"before": reply.text} for i, reply in enumerate(replies[: self.shown])]
        self._write(run, lines)

    def after(self, run: RunDirectory, answer: Answer) -> None:
        """Generate with the trained model and add the completions to samples.jsonl."""
        if not self.conversations:
            return
        replies = answer(self._questions())
        self._score(run, "after", replies)
        lines = [
            line | {"after": reply.text, "stopped": reply.stopped}
            for line, reply in zip(run.samples(), replies, strict=False)  # more are scored than written
        ]
        self._write(run, lines)

    def _questions(self) -> list[list[Message]]:
        return [conversation[: _last_reply(conversation)] for conversation in self.conversations]

    def _line(self, index: int) -> dict[str, Any]:
        """Return prompt and expected reply, and the ``turns`` unless they are a single user turn."""
        conversation = self.conversations[index]
        end = _last_reply(conversation)
        line = {"prompt": question_of(conversation), "expected": conversation[end].content}
        turns = [[turn.role, turn.content, turn.context] for turn in conversation[:end]]
        return line if turns == [["user", line["prompt"], ""]] else line | {"turns": turns}

    def _score(self, run: RunDirectory, when: str, replies: list[Reply]) -> None:
        scores = {f"stopped_{when}": sum(reply.stopped for reply in replies) / len(replies)}
        if self.scored:
            expected = [
                conversation[_last_reply(conversation)].content for conversation in self.conversations
            ]
            right = [reply.text == text.strip() for reply, text in zip(replies, expected, strict=True)]
            scores[f"exact_match_{when}"] = sum(right) / len(right)
        run.update(metrics=scores)

    def _write(self, run: RunDirectory, lines: list[dict[str, Any]]) -> None:
        run.write_lines(SAMPLES, lines)


def turns_of(sample: Mapping[str, Any]) -> list[Message]:
    """Return the prompt of an entry of samples.jsonl as messages."""
    if "turns" not in sample:
        return [Message("user", sample["prompt"])]
    return [Message(role, content, context=context) for role, content, context in sample["turns"]]


def question_of(conversation: Sequence[Message]) -> str:
    """Return the text before a conversation's last reply, for display."""
    end = _last_reply(conversation)
    prompt = "\n".join(filter(None, (turn.content for turn in conversation[:end])))
    return f"{prompt}\n{conversation[end - 1].context}".strip()


def _last_reply(conversation: Sequence[Message]) -> int:
    return max(index for index, turn in enumerate(conversation) if turn.role in REPLIES)


def spread(total: int, count: int) -> list[int]:
    """Return ``count`` evenly spaced indices from 0 to ``total - 1``, including both ends.

    >>> spread(216, 4)
    [0, 72, 143, 215]
    """
    if count >= total or count < 2:
        return list(range(min(count, total)))
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]
