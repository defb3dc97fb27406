"""Tasks with exact answers: examples, instructions, and the prose that teaches them to the base model.

The base model is pretrained on `prose` and `questions` (inside quoted dialogue) of EVERY example; instruction
rows use `asks`. Examples are split by `key`, so that a held-out word or number combination is in no training
row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

HELD_OUT_SHARE = 0.2
MAX_HELD_OUT_KEYS = 60


class TaskExample(NamedTuple):
    """One question of a task: split key, template slots, and the single correct answer."""

    key: str
    slots: dict[str, str]
    answer: str


class InstructionTemplate(NamedTuple):
    """An instruction and an optional separate input; both are format strings over an example's slots."""

    instruction: str
    input: str = ""


@dataclass(frozen=True)
class Task:
    """A type of question with exact answers.

    `variant` in an example's slots is the key of its templates (a task may be asked in two directions);
    one-directional tasks use the key `""`.
    """

    name: str
    language: str
    draw: Callable[[Random], list[TaskExample]]
    instructions: dict[str, tuple[InstructionTemplate, ...]]
    prose: dict[str, tuple[str, ...]]
    questions: dict[str, tuple[str, ...]]
    weight: float = 1.0
    rows: dict[str, str] = field(default_factory=dict)

    def split(self, seed: int) -> tuple[list[TaskExample], list[TaskExample]]:
        """Return (train, held-out) examples with disjoint keys; the same seed gives the same split."""
        rng = Random(f"{seed}/{self.name}/split")
        examples = self.draw(rng)
        keys = sorted({example.key for example in examples})
        rng.shuffle(keys)
        held_out_keys = set(keys[: min(MAX_HELD_OUT_KEYS, max(4, round(len(keys) * HELD_OUT_SHARE)))])
        return [e for e in examples if e.key not in held_out_keys], [
            e for e in examples if e.key in held_out_keys
        ]

    def as_row(self, example: TaskExample, rng: Random, *, inline: bool = False) -> dict[str, str]:
        """Return an example as an Alpaca row; `inline` only uses instructions without a separate input."""
        templates = self.instructions[example.slots.get("variant", "")]
        chosen = rng.choice([template for template in templates if not (inline and template.input)])
        return {
            "instruction": chosen.instruction.format(**example.slots),
            "input": chosen.input.format(**example.slots),
            "output": example.answer,
            "task": self.name,
        }

    def sentence(self, example: TaskExample, rng: Random) -> str:
        """Return an example as a declarative sentence."""
        template = rng.choice(self.prose[example.slots.get("variant", "")])
        return template.format(**example.slots, answer=example.answer)

    def question(self, example: TaskExample, rng: Random) -> str:
        """Return an example as a question in dialogue."""
        return rng.choice(self.questions[example.slots.get("variant", "")]).format(**example.slots)
