"""Rule rewards: user-written Python reward functions, saved with the run.

Sparrow (Glaese et al. 2022, arXiv 2209.14375, section 2.6) combines rule rewards with preference rewards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.reward.settings import RuleSettings
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.user_arguments import CompletionRow, RowFunction
from finetune.recipe.user_files import local_modules
from finetune.recipe.user_function import call_for_number, call_for_numbers, function_file, load_user_function
from finetune.training.run_directory import RULES, RunDirectory


@dataclass(frozen=True)
class FunctionReward:
    """A Python reward function with its name, its weight and its kind (for error messages)."""

    name: str
    weight: float
    function: RowFunction
    kind: str = "rule"

    def scores(self, rows: Sequence[CompletionRow]) -> list[float]:
        """Return the function's score of each completion.

        Raises:
            UserError: the function raised, or returned no number.
        """
        what = f"{self.kind} '{self.name}' on"
        if self.function.is_batch:
            where = f"{what} {rows[0].location}" + (f" to {rows[-1].location}" if len(rows) > 1 else "")
            return call_for_numbers(lambda: self.function.call_batch(rows), len(rows), where=where)
        return [self._score(row, f"{what} {row.location}") for row in rows]

    def _score(self, row: CompletionRow, where: str) -> float:
        return call_for_number(lambda *_: self.function.call(row), row.prompt, row.completion, where=where)


def save_rules(rules: Sequence[RuleSettings], run: RunDirectory) -> None:
    """Copy each rule's file to ``RUN/rules/NUMBER.py``, with the local files that it imports.

    Raises:
        UserError: a file is missing, or two rules import different local files of one name.
    """
    # A copy, so that the finished run scores the same after the user's file has changed.
    if rules and run.is_writer:
        with run.atomic_folder(RULES) as folder:
            for index, rule in enumerate(rules):
                file = _rule_file(rule)
                (folder / f"{index}.py").write_bytes(file.read_bytes())
                for module in local_modules(file):
                    _copy_module(module, folder / module.relative_to(file.parent), rule)


def _copy_module(module: Path, copy: Path, rule: RuleSettings) -> None:
    content = module.read_bytes()
    if copy.exists() and copy.read_bytes() != content:
        actual = f"imports {module.name}, and an earlier rule imports another file of that name"
        raise UserError(Problem(f"rule '{rule.name}'", actual, "local files with unique names", "rename it"))
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(content)


def load_rules(run: Path, rules: Sequence[RuleSettings]) -> list[FunctionReward]:
    """Load the rules of a finished run from its copies of their files.

    Raises:
        UserError: a copy is missing, or it cannot be executed.
    """
    loaded = []
    for index, rule in enumerate(rules):
        name = rule.function.rpartition(":")[2]
        where = f"rule '{rule.name}' of {run}"
        function = load_user_function(f"{run.resolve() / RULES / f'{index}.py'}:{name}", where=where)
        loaded.append(FunctionReward(rule.name, rule.weight, RowFunction(function)))
    return loaded


def _rule_file(rule: RuleSettings) -> Path:
    return function_file(rule.function, where=f"rule '{rule.name}'")
