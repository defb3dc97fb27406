"""Verifiable instructions (IFEval): whether a completion follows what its prompt demands of the form.

The row has ``instruction_id_list`` and ``kwargs``, one entry for each instruction (Zhou et al. 2023, arXiv
2311.07911). The four accuracies of the paper are prompt or instruction level, strict or loose.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from finetune.graders._instruction_checks import CHECKS
from finetune.recipe.errors import did_you_mean
from finetune.recipe.settings import Section

PACKAGES = ("langdetect",)


class Options(Section):
    """Options of the score."""

    loose: bool = Field(
        False,
        description="true: an instruction is followed if the text without its first or last line, or without "
        "asterisks, follows it",
    )
    level: Literal["prompt", "instruction"] = Field(
        "prompt", description="prompt: 1 if all instructions are followed; instruction: their fraction"
    )


DEFAULTS = Options()


def instructions(
    completion: str,
    instruction_id_list: Sequence[str],
    kwargs: Sequence[Mapping[str, Any]],
    *,
    options: Options = DEFAULTS,
) -> float:
    """Return whether all instructions are followed, or with ``level: instruction`` how large a part of them.

    >>> instructions("no comma here", ["punctuation:no_comma"], [{}])
    1.0
    """
    followed = followed_instructions(completion, instruction_id_list, kwargs, loose=options.loose)
    return float(all(followed)) if options.level == "prompt" else sum(followed) / len(followed)


def followed_instructions(
    completion: str, ids: Sequence[str], arguments: Sequence[Mapping[str, Any]], *, loose: bool
) -> list[bool]:
    """Return for each instruction whether the completion follows it.

    Args:
        completion: the response; an empty one follows nothing.
        ids: instruction ids, such as ``punctuation:no_comma``, also with a language (``en:...``).
        arguments: arguments of each instruction; null ones are left out.
        loose: whether any of the paper's eight variants of the response suffices (section 2.2).

    Raises:
        ValueError: there are no instructions, an unknown one, or not the arguments that it needs.
    """
    if not ids or len(ids) != len(arguments):
        raise ValueError(
            f"{len(ids)} instructions with {len(arguments)} arguments, expected one of each or more"
        )
    variants = list(_variants(completion)) if loose else [completion]
    return [
        any(_follows(text, name, values) for text in variants)
        for name, values in zip(ids, arguments, strict=True)
    ]


def _variants(completion: str) -> Iterator[str]:
    lines = completion.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(part)
        text = text if part is lines else text.strip()
        yield text
        yield text.replace("*", "")


def _follows(text: str, name: str, values: Mapping[str, Any]) -> bool:
    group, _, instruction = name.rpartition(":")
    key = f"{group.rpartition(':')[2]}:{instruction}"
    if key not in CHECKS:
        raise ValueError(f"unknown instruction '{name}'; {did_you_mean(key, CHECKS) or 'not one of IFEval'}")
    given = {argument: value for argument, value in values.items() if value is not None}
    return bool(text.strip()) and CHECKS[key](text, **given)
