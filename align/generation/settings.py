"""Settings of ``generate``, and checks of its choices; without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.recipe.errors import Problem, UserError, did_you_mean

WHERE = "choices"


def check_labels(labels: Sequence[str]) -> None:
    """Raise UserError unless these are two or more different labels with text."""
    repeated = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    expected = "two or more different labels"
    if any(not label.strip() for label in labels):
        raise UserError(Problem(WHERE, "a label without text", expected))
    if repeated:
        raise UserError(Problem(WHERE, f"'{repeated[0]}' twice", expected))
    if len(labels) < 2:
        actual = f"one label only, '{labels[0]}'" if labels else "no label"
        raise UserError(
            Problem(WHERE, actual, expected, "separate them by commas, or one per line of a file")
        )


@dataclass(frozen=True)
class GenerateSettings:
    """What decides the results, besides the model and the rows.

    Attributes:
        choices: the labels to choose from; None: completions.
        max_new_tokens: maximum tokens of a completion.
        temperature: 0 is greedy decoding.
        seed: of the samples; a row's samples depend on its number, not on the rows around it.
        limit: rows to answer; None: all.
    """

    choices: Sequence[str] | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    limit: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the result columns."""
        return ("completion", "finish_reason") if self.choices is None else ("label", "probabilities")


def unknown_labels(gold: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return lines on labels of rows that are no choice, the most frequent first, five at most."""
    unknown = [label for label in gold if label not in labels]
    names = sorted(dict.fromkeys(unknown), key=lambda label: -unknown.count(label))
    return [
        f"'{name}' ({unknown.count(name):,} rows) is no choice, so these rows count as wrong"
        + (f"; {hint}" if (hint := did_you_mean(name, labels)) else "")
        for name in names[:5]
    ]
