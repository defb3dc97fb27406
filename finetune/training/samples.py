"""samples.jsonl: completions before and after training, side by side, and the exact-match rate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_templates.segments import Message
from finetune.recipe.user_arguments import completion_row, last_reply_index, prompt_text
from finetune.training.generation import Completion
from finetune.training.held_out_file import graded_entry, write_graded
from finetune.training.metric_specs import When
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.run_directory import SAMPLES, RunDirectory

GenerateFn = Callable[[Sequence[Sequence[Message]]], list[Completion]]


@dataclass(frozen=True)
class Samples:
    """Conversations with their expected replies; the first ``num_shown`` are written, all are scored.

    ``locations`` are those of their rows.
    """

    conversations: list[list[Message]]
    num_shown: int
    scored: bool
    locations: Sequence[str]

    def record_before(self, run: RunDirectory, generate: GenerateFn) -> None:
        """Generate with the untrained model; skipped if a resumed run has done so."""
        if not self.conversations or run.samples():
            return
        completions = generate(self._prompts())
        self._record_scores(run, "before", completions)
        entries = [
            self._entry(i) | {"before": completion.text}
            for i, completion in enumerate(completions[: self.num_shown])
        ]
        self._write(run, entries)

    def record_after(self, run: RunDirectory, generate: GenerateFn) -> None:
        """Generate with the trained model and add the completions to samples.jsonl."""
        if not self.conversations:
            return
        completions = generate(self._prompts())
        self._record_scores(run, "after", completions)
        entries = [
            entry | {"after": completion.text, "ended_with_eos": completion.ended_with_eos}
            # Not strict: more completions are scored than written.
            for entry, completion in zip(run.samples(), completions, strict=False)
        ]
        self._write(run, entries)

    def _prompts(self) -> list[list[Message]]:
        return [conversation[: last_reply_index(conversation)] for conversation in self.conversations]

    def _entry(self, index: int) -> dict[str, Any]:
        """Return prompt and expected reply, and the ``turns`` unless they are a single user turn."""
        conversation = self.conversations[index]
        end = last_reply_index(conversation)
        entry = {"prompt": prompt_text(conversation), "expected": conversation[end].content}
        turns = [list(turn.key) for turn in conversation[:end]]
        return entry if turns == [["user", entry["prompt"], ""]] else entry | {"turns": turns}

    def _record_scores(self, run: RunDirectory, when: When, completions: list[Completion]) -> None:
        cases = {"samples/eos_rate": len(completions)}
        scores = {
            f"samples/eos_rate_{when}": sum(completion.ended_with_eos for completion in completions)
            / len(completions)
        }
        if self.scored:
            expected = [
                conversation[last_reply_index(conversation)].content for conversation in self.conversations
            ]
            correct = [
                # Decoded replies are stripped.
                completion.text == text.strip()
                for completion, text in zip(completions, expected, strict=True)
            ]
            scores[f"{EVAL_PREFIX}exact_match_{when}"] = sum(correct) / len(correct)
            cases[f"{EVAL_PREFIX}exact_match"] = len(correct)
            write_graded(run, "exact_match", when, self._graded(completions, correct))
        run.update(metrics=scores, cases=cases)

    def _graded(self, completions: list[Completion], correct: list[bool]) -> list[dict[str, Any]]:
        """Return the entries of held_out.jsonl."""
        rows = zip(self.conversations, self.locations, completions, correct, strict=True)
        entries = []
        for turns, location, completion, is_correct in rows:
            end = last_reply_index(turns)
            reply = [*turns[:end], Message("assistant", completion.text)]
            row = completion_row(reply, location, reference=turns[end].content)
            entries.append(graded_entry(row, ended_with_eos=completion.ended_with_eos, correct=is_correct))
        return entries

    def _write(self, run: RunDirectory, entries: list[dict[str, Any]]) -> None:
        run.write_jsonl(SAMPLES, entries)


def sample_turns(sample: Mapping[str, Any]) -> list[Message]:
    """Return the prompt of an entry of samples.jsonl as messages."""
    if "turns" not in sample:
        return [Message("user", sample["prompt"])]
    return [
        Message(role, content, context, reasoning="".join(extra[:1]), tool_calls="".join(extra[1:]))
        for role, content, context, *extra in sample["turns"]
    ]


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return ``count`` evenly spaced indices from 0 to ``total - 1``, including both ends.

    >>> evenly_spaced(216, 4)
    [0, 72, 143, 215]
    """
    if count >= total or count < 2:
        return list(range(min(count, total)))
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]
