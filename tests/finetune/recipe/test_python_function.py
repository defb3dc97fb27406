"""User functions of a recipe (file.py:function): loading, calling, and errors with a repair."""

from pathlib import Path

import pytest

from finetune.recipe.errors import UserError
from finetune.recipe.python_function import call_problems, function_file, load_function

RULES = """\
from dataclasses import dataclass
from math import sqrt


@dataclass
class Scale:
    factor: "float" = 2.0


def ends_happily(prompt: str, completion: str) -> float:
    return Scale().factor * completion.endswith("happy.")
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


def refused(text: str) -> str:
    with pytest.raises(UserError) as told:
        load_function(text, where="reward.rules[0].function")
    assert told.value.problems[0].where == "reward.rules[0].function"
    return str(told.value)


def test_a_function_is_found_by_relative_and_absolute_paths(rules: Path) -> None:
    for path in ("rules.py", f"{rules}"):
        function = load_function(f"{path}:ends_happily", where="here")
        assert function("p", "They were happy.") == 2.0
        assert function("p", "They were sad.") == 0.0
    assert function_file("rules.py:ends_happily", where="here").read_text() == RULES


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "rules.py").write_text(f"def rule():\n    return {number}\n")
        found.append(load_function(f"{tmp_path}/{number}/rules.py:rule", where="here"))
    assert [function() for function in found] == [1, 2]


@pytest.mark.parametrize("text", ["rules.py", "rules:ends_happily", "rules.py:", "rules.py:a b", ""])
def test_other_spellings_are_refused(rules: Path, text: str) -> None:
    assert "path/to/file.py:function" in refused(text)


def test_a_missing_file_is_named_with_the_folder_it_was_looked_for_in(tmp_path: Path) -> None:
    told = refused("nowhere/rules.py:ends_happily")
    assert "'nowhere/rules.py' does not exist" in told and str(Path.cwd()) in told


def test_a_missing_function_lists_those_of_the_file(rules: Path) -> None:
    told = refused("rules.py:ends_happyly")
    assert "has no function 'ends_happyly'" in told and "did you mean 'ends_happily'?" in told
    assert "sqrt" not in told, "what is no Python function of the file is not offered"


@pytest.mark.parametrize(
    ("text", "told"), [("def (", "SyntaxError"), ("import no_such", "no_such"), ("1/0", "Zero")]
)
def test_a_file_that_cannot_be_executed_is_told(rules: Path, text: str, told: str) -> None:
    rules.write_text(text)
    assert told in refused("rules.py:ends_happily")


def test_wrong_arguments_are_told(rules: Path) -> None:
    function = load_function("rules.py:ends_happily", where="here")
    assert call_problems(function, ("prompt", "completion"), where="here") == []
    [problem] = call_problems(function, ("prompt",), where="here")
    assert "missing a required argument: 'completion'" in problem.found
    assert problem.expected == "a function that takes (prompt)"
