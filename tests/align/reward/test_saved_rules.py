"""The copies of rules' files in a reward run: complete, and independent of the user's folder."""

import shutil
from pathlib import Path

import pytest

from align.reward.function_reward import load_rules, save_rules
from align.reward.settings import RuleSettings
from finetune.recipe.errors import UserError
from finetune.recipe.user_arguments import CompletionRow
from finetune.training.atomic_files import atomic_folder


class Run:
    """A run directory of which only the rules are written."""

    is_writer = True

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def atomic_folder(self, name: str):  # noqa: ANN201 - that of the library
        return atomic_folder(self.path, name)


def rule_of(folder: Path, factor: int) -> RuleSettings:
    folder.mkdir()
    (folder / "rules.py").write_text(
        "import helper\n\ndef rule(completion):\n    return helper.FACTOR * len(completion)\n"
    )
    (folder / "helper.py").write_text(f"FACTOR = {factor}\n")
    return RuleSettings(name=folder.name, function=f"{folder}/rules.py:rule")


def test_a_rule_s_local_imports_are_saved_with_it(tmp_path: Path) -> None:
    run, rule = Run(tmp_path / "run"), rule_of(tmp_path / "own", 2)
    save_rules([rule], run)  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "own")
    [loaded] = load_rules(run.path, [rule])
    assert loaded.scores([CompletionRow("p", "four")]) == [8.0]


def test_two_local_files_of_one_name_are_refused(tmp_path: Path) -> None:
    rules = [rule_of(tmp_path / name, factor) for factor, name in enumerate("ab")]
    with pytest.raises(UserError, match=r"rule 'b': imports helper.py, and an earlier rule"):
        save_rules(rules, Run(tmp_path / "run"))  # type: ignore[arg-type]
