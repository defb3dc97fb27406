"""Rules beside a reward model: the user's programs, kept with the run so that they serve later.

Sparrow (Glaese et al. 2022, arXiv 2209.14375, section 2.6) adds what rules say to what preferences say.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from align.reward.settings import RuleSettings, Settings
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_function import function_file, load_function
from finetune.recipe.settings import StageSettings
from finetune.training.run_directory import RULES, RunDirectory
from finetune.training.run_fingerprint import run_fingerprint


@dataclass(frozen=True)
class Rule:
    """A reward that is a program, and how many times it counts."""

    name: str
    weight: float
    function: Callable[[str, str], Any]

    def scores(
        self, prompts: Sequence[str], completions: Sequence[str], places: Sequence[str]
    ) -> list[float]:
        """Return what the rule says of each completion.

        Args:
            prompts: one for each completion.
            completions: what is judged.
            places: what each one is called in a message.

        Raises:
            UserError: it raised something, or gave no number.
        """
        rows = zip(prompts, completions, places, strict=True)
        return [self._score(prompt, completion, place) for prompt, completion, place in rows]

    def _score(self, prompt: str, completion: str, place: str) -> float:
        where = f"rule '{self.name}' on {place}"
        try:
            value = self.function(prompt, completion)
        except Exception as error:  # the function is the user's and may raise anything
            found = f"{type(error).__name__}: {error}"
            raise UserError(Problem(where, found, "a number, or true or false")) from error
        if not isinstance(value, (bool, int, float)) or not isfinite(value):
            raise UserError(Problem(where, f"it gave {value!r}", "a finite number, or true or false"))
        return float(value)


def fingerprint_of(settings: StageSettings) -> str:
    """Return a digest of data and start (``run_fingerprint``) and of the rules' files."""
    assert isinstance(settings, Settings)
    own = run_fingerprint(settings)
    if not settings.reward.rules:
        return own
    files = [_file(rule) for rule in settings.reward.rules]
    content = [own, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def copy_rules(settings: StageSettings, run: RunDirectory) -> None:
    """Write each rule's file to ```RUN/rules/NUMBER.py```."""
    assert isinstance(settings, Settings)
    if settings.reward.rules:
        with run.replacing(RULES) as folder:
            for number, rule in enumerate(settings.reward.rules):
                (folder / f"{number}.py").write_bytes(_file(rule).read_bytes())


def saved_rules(run: Path, rules: Sequence[RuleSettings]) -> list[Rule]:
    """Return the rules of a finished run, from its own copies of their files.

    Raises:
        UserError: a copy is gone, or it cannot be executed.
    """
    found = []
    for number, rule in enumerate(rules):
        name = rule.function.rpartition(":")[2]
        where = f"rule '{rule.name}' of {run}"
        function = load_function(f"{run.resolve() / RULES / f'{number}.py'}:{name}", where=where)
        found.append(Rule(rule.name, rule.weight, function))
    return found


def _file(rule: RuleSettings) -> Path:
    return function_file(rule.function, where=f"rule '{rule.name}'")
