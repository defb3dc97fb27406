"""Rule rewards: user-written Python reward functions, saved with the run.

Sparrow (Glaese et al. 2022, arXiv 2209.14375, section 2.6) combines rule rewards with preference rewards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.reward.settings import RuleSettings, Settings
from finetune.recipe.python_function import function_file, load_function, number_from
from finetune.recipe.settings import StageSettings
from finetune.training.run_directory import RULES, RunDirectory


@dataclass(frozen=True)
class Rule:
    """A Python reward function with its name, its weight and its kind (for error messages)."""

    name: str
    weight: float
    function: Callable[[str, str], Any]
    kind: str = "rule"

    def scores(
        self, prompts: Sequence[str], completions: Sequence[str], places: Sequence[str]
    ) -> list[float]:
        """Return the rule's score of each completion.

        Args:
            prompts: one per completion.
            completions: the texts to score.
            locations: location of each completion, for error messages.

        Raises:
            UserError: the function raised, or returned no number.
        """
        return [
            number_from(self.function, prompt, completion, where=f"{self.kind} '{self.name}' on {place}")
            for prompt, completion, place in zip(prompts, completions, places, strict=True)
        ]


def copy_rules(settings: StageSettings, run: RunDirectory) -> None:
    """Copy each rule's file to ``RUN/rules/NUMBER.py``."""
    assert isinstance(settings, Settings)
    # A copy, so that the finished run scores the same after the user's file has changed.
    if settings.reward.rules and run.writes:
        with run.replacing(RULES) as folder:
            for number, rule in enumerate(settings.reward.rules):
                (folder / f"{number}.py").write_bytes(_file(rule).read_bytes())


def saved_rules(run: Path, rules: Sequence[RuleSettings]) -> list[Rule]:
    """Load the rules of a finished run from its copies of their files.

    Raises:
        UserError: a copy is missing, or it cannot be executed.
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
