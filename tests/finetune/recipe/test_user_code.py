"""Import of users' files: what they do to the process is undone, and what goes wrong is one message."""

import gc
import io
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.recipe.errors import UserError
from finetune.recipe.user_function import UserFunction, file_digest, load_user_function

FUNCTION = "\n\ndef rule(prompt, completion):\n    return 1.0\n"
Load = Callable[[str], UserFunction]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str) -> UserFunction:
        (tmp_path / "rules.py").write_text(text)
        return load_user_function(f"{tmp_path}/rules.py:rule", where="rewards")

    return write_and_load


def process_state() -> dict[str, Any]:
    """Return what a user's code may have changed."""
    root = logging.getLogger()
    return {
        "argv": list(sys.argv),
        "path": list(sys.path),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "numpy errors": np.geterr(),
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "warnings": list(warnings.filters),
        "logging": (root.level, list(root.handlers), root.manager.disable),
        "recursion": sys.getrecursionlimit(),
        "gc": gc.isenabled(),
    }


CARELESS = {
    "argparse": "import argparse\nargparse.ArgumentParser().parse_args()",
    "seeds": "import random, numpy, torch\nrandom.seed(1); numpy.random.seed(1); torch.manual_seed(1)",
    "draws": "import random, numpy, torch\nrandom.random(); numpy.random.rand(); torch.rand(3)",
    "dtype": "import torch\ntorch.set_default_dtype(torch.float64)",
    "device": "import torch\ntorch.set_default_device('meta')",
    "grad": "import torch\ntorch.set_grad_enabled(False)",
    "threads": "import torch\ntorch.set_num_threads(torch.get_num_threads() + 1)",
    "matmul": "import torch\ntorch.set_float32_matmul_precision('medium')",
    "numpy errors": "import numpy\nnumpy.seterr(all='raise')",
    "warnings": "import warnings\nwarnings.simplefilter('error')",
    "logging": "import logging\nlogging.basicConfig(level=0, force=True)\nlogging.disable(50)",
    "signals": "import signal\nsignal.signal(2, signal.SIG_IGN); signal.signal(15, signal.SIG_DFL)",
    "environment": "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = ''\nos.environ.pop('HOME', None)",
    "folder": "import os\nos.chdir('/')",
    "path": "import sys\nsys.path.insert(0, '/'); sys.argv.append('x')",
    "prints": "for i in range(10000): print('import', i)",
    "recursion": "import sys\nsys.setrecursionlimit(5000)",
    "collector": "import gc\ngc.disable()",
    "thread": "import threading\nthreading.Thread(target=lambda: None).start()",
    "main guard": "import sys\nif __name__ == '__main__':\n    sys.exit('this is the main program')",
}


@pytest.mark.slow  # torch imports its compiler for this setting
def test_deterministic_algorithms_of_a_file_are_not_those_of_the_run(load: Load) -> None:
    before = process_state()
    load("import torch\ntorch.use_deterministic_algorithms(True)" + FUNCTION)
    assert process_state() == before


@pytest.mark.parametrize("text", CARELESS.values(), ids=list(CARELESS))
def test_a_file_s_import_leaves_the_process_as_it_was(
    load: Load, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = process_state()
    function = load(text + FUNCTION)
    assert process_state() == before
    assert function("p", "c") == 1.0
    assert process_state() == before
    assert capsys.readouterr().out == "", "standard output is the program's own"


@pytest.mark.parametrize("text", [text for name, text in CARELESS.items() if name != "main guard"])
def test_a_call_leaves_the_process_as_it_was(load: Load, text: str) -> None:
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    function = load(f"def rule(prompt, completion):\n{lines}    return 1.0\n")
    before = process_state()
    assert function("p", "c") == 1.0
    assert process_state() == before


def test_a_file_keeps_its_environment_and_its_folder_for_its_calls(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    (tmp_path / "words.txt").write_text("happy")
    text = f"import os\nos.chdir({str(tmp_path)!r})\nos.environ['JUDGE_KEY'] = 'k'\n"
    text += "def rule(p, c):\n    return os.environ['JUDGE_KEY'] + open('words.txt').read() + c\n"
    function = load(text)
    assert "JUDGE_KEY" not in os.environ
    assert [function("p", "!"), function("p", "?")] == ["khappy!", "khappy?"]
    assert "JUDGE_KEY" not in os.environ


def test_random_numbers_depend_on_the_texts_alone(load: Load) -> None:
    text = "import random, numpy, torch\n\ndef rule(p, c):\n"
    text += "    return random.random(), float(numpy.random.rand()), float(torch.rand(1))\n"
    first, second = load(text), load(text)
    assert first("p", "c") == first("p", "c") == second("p", "c")
    assert len({first("p", "c"), first("p", "d"), first("q", "c")}) == 3


REFUSED = {
    "sys.exit": ("import sys\nsys.exit(3)", "it called sys.exit(3)", "rules.py:2", "__main__"),
    "required argument": (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--x', required=True)\n"
        "parser.parse_args()",
        "it called sys.exit(2)",
        "rules.py:4",
        "__main__",
    ),
    "input": ("name = input('Your name? ')", "EOFError", "rules.py:1", "no input()"),
    "error": ("x = 1\nx / 0", "ZeroDivisionError: division by zero", "rules.py:2", ""),
    "syntax": ("x = 1\ndef (", "SyntaxError", "rules.py, line 2", ""),
    "indentation": ("if 1:\nx = 1", "IndentationError", "line 2", ""),
    "null": ("x = '\0'", "null bytes", "", ""),
    "module": (
        "import no_such_module",
        "No module named",
        "rules.py:1",
        "pip install no_such_module, or put",
    ),
    "relative": ("from . import helper", "relative import", "rules.py:1", "by their name"),
    "generator exit": ("raise GeneratorExit", "GeneratorExit", "rules.py:1", ""),
    "recursion": ("def f():\n    return f()\nf()", "RecursionError", "rules.py:2", ""),
    "no text": ("class E(Exception):\n    def __str__(self): 1/0\nraise E", "E: <exception str()", ":3", ""),
    "long text": ("raise ValueError('x' * 10**6)", "ValueError: xxx", "rules.py:1", ""),
    "in a library": ("import json\njson.loads('{')", "JSONDecodeError", "rules.py:2", ""),
    "run": (
        "from align import load_recipe, run\nrun(load_recipe('sft/quickstart'))",
        "no run inside a user's file",
        "rules.py:2",
        "",
    ),
}


@pytest.mark.parametrize(("text", "actual", "line", "repair"), REFUSED.values(), ids=list(REFUSED))
def test_a_file_that_cannot_be_imported_is_one_message_with_its_line(
    load: Load, text: str, actual: str, line: str, repair: str
) -> None:
    before = process_state()
    with pytest.raises(UserError) as message:
        load(text + FUNCTION)
    [problem] = message.value.problems
    assert actual in str(problem) and line in str(problem) and repair in problem.repair
    assert len(problem.actual) < 1000
    assert process_state() == before


def test_ctrl_c_during_an_import_is_no_error_of_the_file(load: Load) -> None:
    with pytest.raises(KeyboardInterrupt):
        load("raise KeyboardInterrupt")


def test_input_at_a_call_does_not_wait(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("rows of the user's pipe\n"))
    with pytest.raises(EOFError):
        load("def rule(p, c):\n    return input()\n")("p", "c")
    assert sys.stdin.read() == "rows of the user's pipe\n"


def folder_of_rules(folder: Path, factor: int) -> str:
    folder.mkdir()
    (folder / "rules.py").write_text("from helper import factor\n\ndef rule(p, c):\n    return factor()\n")
    (folder / "helper.py").write_text("import words.list\n\ndef factor():\n    return words.list.FACTOR\n")
    (folder / "words").mkdir()
    (folder / "words/__init__.py").touch()
    (folder / "words/list.py").write_text(f"FACTOR = {factor}\n")
    (folder / "unused.py").write_text("1/0\n")
    return f"{folder}/rules.py:rule"


def test_local_files_are_imported_and_are_part_of_the_digest(tmp_path: Path) -> None:
    texts = [folder_of_rules(tmp_path / str(number), number) for number in (1, 2)]
    assert [load_user_function(text, where="here")("p", "c") for text in texts] == [1, 2]
    digest = file_digest(texts[0], where="here")
    (tmp_path / "1/unused.py").write_text("other\n")
    assert file_digest(texts[0], where="here") == digest
    (tmp_path / "1/words/list.py").write_text("FACTOR = 3\n")
    assert file_digest(texts[0], where="here") != digest
    assert load_user_function(texts[0], where="here")("p", "c") == 3, "an edited file is read again"


def test_a_local_file_does_not_replace_an_installed_library(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit\n")
    (tmp_path / "rules.py").write_text("import yaml\n\ndef rule(p, c):\n    return yaml.safe_load(c)\n")
    assert load_user_function(f"{tmp_path}/rules.py:rule", where="here")("p", "7") == 7
