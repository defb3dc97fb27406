"""User functions of a recipe (file.py:function): loading, calling, and errors with a repair."""

from pathlib import Path

import pytest

from finetune.recipe.errors import UserError
from finetune.recipe.user_arguments import signature_problems
from finetune.recipe.user_function import function_file, load_user_function

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


def error_message(text: str) -> str:
    with pytest.raises(UserError) as message:
        load_user_function(text, where="reward.rules[0].function")
    assert message.value.problems[0].where == "reward.rules[0].function"
    return str(message.value)


def test_a_function_is_loaded_by_relative_and_absolute_paths(rules: Path) -> None:
    for path in ("rules.py", f"{rules}"):
        function = load_user_function(f"{path}:ends_happily", where="here")
        assert function("p", "They were happy.") == 2.0
        assert function("p", "They were sad.") == 0.0
    assert function_file("rules.py:ends_happily", where="here").read_text() == RULES


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    actual = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "rules.py").write_text(f"def rule():\n    return {number}\n")
        actual.append(load_user_function(f"{tmp_path}/{number}/rules.py:rule", where="here"))
    assert [function() for function in actual] == [1, 2]


@pytest.mark.parametrize("text", ["rules.py", "rules:ends_happily", "rules.py:", "rules.py:a b", ""])
def test_invalid_formats_are_rejected(rules: Path, text: str) -> None:
    assert "path/to/file.py:function" in error_message(text)


def test_a_missing_file_is_named_with_the_working_directory(tmp_path: Path) -> None:
    message = error_message("nowhere/rules.py:ends_happily")
    assert "'nowhere/rules.py' does not exist" in message and str(Path.cwd()) in message


def test_a_missing_function_lists_those_of_the_file(rules: Path) -> None:
    message = error_message("rules.py:ends_happyly")
    assert "has no function 'ends_happyly'" in message and "did you mean 'ends_happily'?" in message
    assert "sqrt" not in message, "what is no Python function of the file is not offered"


@pytest.mark.parametrize(
    ("text", "message"), [("def (", "SyntaxError"), ("import no_such", "no_such"), ("1/0", "Zero")]
)
def test_a_file_that_cannot_be_imported_is_reported(rules: Path, text: str, message: str) -> None:
    rules.write_text(text)
    assert message in error_message("rules.py:ends_happily")


def test_wrong_parameters_are_reported(rules: Path) -> None:
    function = load_user_function("rules.py:ends_happily", where="here")
    assert signature_problems(function, ("prompt", "completion"), where="here") == []
    [problem] = signature_problems(function, ("prompt",), where="here")
    assert "nothing fills the parameter 'completion'" in problem.actual
    assert problem.expected == "parameters named prompt"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("finetune/tiny/graders.py:happy_end", "finetune/graders/stories.py:happy_end"),
        ("align/rl/rules/answers.py:same_number", "number"),
        ("finetune/graders/answers.py:same_number", "number"),
    ],
)
def test_a_renamed_function_is_refused_with_its_new_name(old: str, new: str) -> None:
    assert f"`{old}` was renamed to `{new}`" in error_message(old)
    assert function_file(new, where="here").is_file()
