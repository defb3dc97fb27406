"""Every command, recipe and Python example of the pages is valid: what takes seconds is run."""

import ast
import importlib
import inspect
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
from page_code import MISTAKE, commands, fences, words_of
from test_house import ROOT

import align
from align.cli import cli
from align.evaluation.held_out import PREFIX
from align.pipeline.plan import resolve_pipeline
from finetune.evaluation.suites import Suite, suite_names
from finetune.recipe.discovery import local_path, stage_names, stage_of_verb, verb_of
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe
from finetune.recipe.yaml_file import read_yaml
from finetune.training.merge import merge_run

STAGE_VERBS = {verb_of(stage) for stage in stage_names()} | {"coh"}
LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "srun", "CUDA_VISIBLE_DEVICES=0")
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
"""What a launcher sets in the first of its processes."""
OTHER_PROGRAMS = ("pip", "git", "cd", "source", "eval", "tensorboard", "axolotl", "llamafactory-cli", "trl")
OTHER_PROGRAMS += ("pytest", "rm", "export", "nvidia-smi", "kill", "ls", "mkdir", "sbatch", "trl110/bin/pip")
"""Programs of others: their commands are not tried here."""
RUN_FOLDERS = ("sft-alpaca-1a2b3c4d", "sft-quickstart-1a2b3c4d", "dpo-hh-1a2b3c4d", "ppo-hh-1a2b3c4d")
RUN_FOLDERS += (
    "sft-classify-1a2b3c4d",
    "pretrain-in-house-5e6f7a8b",
    "kto-kto-mix-1a2b3c4d",
    "dpo-quickstart-1a2b3c4d",
)
FIT_STATUS = (0, 3)
SFT = {"instruction": "Add the numbers.", "input": "# 2", "output": "The sum is #."}
CHAT = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}]
PAIR = {"prompt": "Write story #.", "chosen": "# and # were happy.", "rejected": "# was sad."}
FILES: dict[str, dict[str, object]] = {
    "my.jsonl": dict(SFT),
    "instructions.jsonl": dict(SFT),
    "chat.jsonl": {"messages": CHAT},
    "sharegpt.jsonl": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "hi"}]},
    "tools.jsonl": {"messages": CHAT, "tools": None},
    "general.jsonl": {"text": "A text."},
    "pairs.jsonl": dict(PAIR),
    "ranked.jsonl": {"prompt": "Say hi #.", "responses": ["hi", "hello"], "scores": [1, 2]},
    "thumbs.jsonl": {"prompt": "Say hi #.", "completion": "hi", "label": True},
    "prompts.jsonl": {"prompt": "Say hi #."},
    "questions.jsonl": {"prompt": "1 + #?", "answer": "2"},
}
"""Files of the reader that the pages name: one row, written many times, with its number for `#`."""
NUM_ROWS = 300
"""More than any recipe holds out: a dry run reads the rows."""


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files and finished runs that the pages speak of."""
    folder = tmp_path_factory.mktemp("reader")
    for name, row in FILES.items():
        lines = (json.dumps(row).replace("#", str(number)) + "\n" for number in range(NUM_ROWS))
        (folder / name).write_text("".join(lines), encoding="utf-8")
    (folder / "my.csv").write_text("instruction,input,output\n" + "Add.,1 2,3\n" * NUM_ROWS, encoding="utf-8")
    labels = ("billing", "delivery", "login", "technical")
    tickets = [f"Ticket {number}.,{labels[number % 4]}\n" for number in range(NUM_ROWS)]
    (folder / "tickets.csv").write_text("text,label\n" + "".join(tickets), encoding="utf-8")
    (folder / "queue.csv").write_text("body,queue\n" + "".join(tickets), encoding="utf-8")
    (folder / "new_tickets.csv").write_text("text\nWhere is it?\n", encoding="utf-8")
    (folder / "labels.txt").write_text("\n".join(labels), encoding="utf-8")
    (folder / "qa.csv").write_text("Q,A\n" + "1 + 1?,2\n" * NUM_ROWS, encoding="utf-8")
    suite = (
        "description: mine\ntask: completion\ndata: {source: my.jsonl}\ngrader: exact\nmax_new_tokens: 2\n"
    )
    (folder / "mine.yaml").write_text(suite, encoding="utf-8")
    (folder / "corpus").mkdir()
    for name in ("a.txt", "b.md"):
        (folder / "corpus" / name).write_text("A text. " * 40, encoding="utf-8")
    function = "def {}(prompt, completion):\n    return float(len(completion))\n"
    (folder / "judge.py").write_text(function.format("happy_end"), encoding="utf-8")
    for name in ("reward", "number", "form", "length"):
        (folder / f"{name}.py").write_text(function.format(name), encoding="utf-8")
    (folder / "my-recipe.yaml").write_text("stage: sft\ndata: {source: my.jsonl}\n", encoding="utf-8")
    stages = "stages:\n  sft: {recipe: sft/quickstart}\n  dpo: {recipe: dpo/quickstart, from: sft}\n"
    (folder / "my-pipeline.yaml").write_text(stages, encoding="utf-8")
    _finished_runs(folder)
    return folder


def _finished_runs(folder: Path) -> None:
    settings = {"train.max_steps": 1, "evaluate.samples": 0, "data.held_out": 0}
    train = folder / "runs" / RUN_FOLDERS[0]
    recipe = {"data": str(folder / "my.jsonl"), "settings": {**settings, "evaluate.exact_match": 0}}
    align.run(align.load_recipe("quickstart", out=train, **recipe))  # type: ignore[arg-type]
    # Merged, as `--base RUN` needs it: a page's command may run before its `merge`.
    merge_run(train)
    for name in RUN_FOLDERS[1:]:
        shutil.copytree(train, train.with_name(name))
    reward = {"data": str(folder / "pairs.jsonl"), "settings": {**settings, "model.init_from": str(train)}}
    out = train.with_name("reward-hh-1a2b3c4d")
    align.run(align.load_recipe("quickstart", stage="reward", out=out, **reward))  # type: ignore[arg-type]


@pytest.fixture
def there(reader_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(reader_folder)
    return reader_folder


def _ids(value: object) -> str:
    return str(value).replace("/", "-")


@pytest.mark.parametrize(("page", "line"), commands(), ids=_ids)
def test_command(page: str, line: str, there: Path) -> None:
    words = words_of(line)
    if MISTAKE in line:
        with pytest.raises((UserError, click.ClickException)):
            run_command(words)
    else:
        run_command(words)


def run_command(words: list[str]) -> None:
    """Run a command of a page as far as it goes without a GPU, a hub, and minutes.

    Raises:
        AssertionError: it cannot work.
        UserError: the program refuses it.
    """
    program = words[0]
    if program == "make":
        run_make(words)
    elif program in ("llm-align", "build/llm-align"):
        run_llm_align(words[1:])
    elif program in LAUNCHERS:
        start = next(index for index, word in enumerate(words) if word in ("align", "llm-align"))
        with mock.patch.dict(os.environ, LAUNCHED):
            run_llm_align(words[start + 1 :])
    elif program == "python" and words[1] == "-m":
        assert find_spec(words[2]) is not None, f"no module {words[2]}"
    else:
        assert program in (*OTHER_PROGRAMS, "python"), f"unknown program: {' '.join(words)}"


def run_make(words: list[str]) -> None:
    """Run the command that make would run."""
    environment = {"PATH": os.environ["PATH"]}
    call = ["make", "-n", "-C", str(ROOT), "--no-print-directory", *words[1:]]
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith(".venv/bin/llm-align "):
            run_llm_align(words_of(line)[1:])


def run_llm_align(words: list[str]) -> None:
    verb = words[0]
    if verb in STAGE_VERBS or verb == "run":
        invoke([*words, "--dry-run"])
    elif verb == "data" and not _is_local(words):
        invoke(["show", *_without_options(words[1:])])
    elif verb == "chat":
        prompt = [] if "--prompt" in words else ["--prompt", "Hi"]
        invoke([*words, *prompt, "--max-new-tokens", "2"])
    elif verb == "generate":
        invoke([*words, "--limit", "3", "--max-new-tokens", "2"])
    elif verb == "finish":
        # The reader's runs are finished: the words alone are checked.
        cli.commands[verb].make_context(verb, words[1:])
    elif verb == "eval":
        invoke(_evaluation_here(words))
    elif verb == "plan":
        try:
            invoke(words)
        except SystemExit as end:
            assert end.code in FIT_STATUS
    else:
        invoke(words)


def _evaluation_here(words: list[str]) -> list[str]:
    """Return the words of `llm-align eval` with two items, and the reader's suite for published ones."""
    words = list(words)
    if "--suite" in words:
        where = words.index("--suite") + 1
        for name in words[where].split(","):
            assert name == PREFIX or name in suite_names() or Path(name).is_file(), f"no suite {name}"
        words[where] = "mine.yaml"
    else:
        words += ["--suite", "mine.yaml"]
    return [*words, "--limit", "2", "--cache", "answers"]


def invoke(words: list[str]) -> None:
    try:
        cli.main(words, standalone_mode=False)
    except SystemExit as end:
        if end.code not in (0, None) and words[0] != "plan":
            raise AssertionError(f"llm-align {' '.join(words)}: exit status {end.code}") from end
        raise


def _is_local(words: list[str]) -> bool:
    """Return whether `llm-align data` of these words reads files of the reader and a model that is here."""
    bases = [words[index + 1] for index, word in enumerate(words) if word == "--base"]
    sources = [words[index + 1] for index, word in enumerate(words) if word == "--data"]
    quickstart = any("quickstart" in word for word in words)
    here = all(local_path(source) for source in sources) and (bool(sources) or quickstart)
    return here and quickstart and all(base == "tiny" for base in bases)


def _without_options(words: list[str]) -> list[str]:
    """Return the words of `data` that `show` has too, with --base and --data as settings."""
    kept: list[str] = []
    names = {"--base": "model.base", "--data": "data.source"}
    values = iter(words)
    for word in values:
        if word in names:
            kept.append(f"{names[word]}={next(values)}")
        elif word in ("--html", "--rows"):
            next(values)
        elif word != "--json":
            kept.append(word)
    return kept


RECIPES = [(page, code) for page, code in fences("yaml") if not code.startswith("# not a recipe")]


@pytest.mark.parametrize(("page", "code"), RECIPES, ids=_ids)
def test_yaml_is_a_recipe_or_a_part_of_one(page: str, code: str, there: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.yaml"
    file.write_text(code, encoding="utf-8")
    content, _ = read_yaml(file)
    if "stages" in content:
        assert resolve_pipeline(str(file)).entries
    elif "task" in content:
        assert Suite(**content).task == content["task"]
    elif "stage" in content:
        assert read_recipe(content["stage"], str(file)).stage == content["stage"]
    else:
        problems = [problem for stage in stage_names() if (problem := part_problem(stage, content, file))]
        assert len(problems) < len(stage_names()), "\n".join(problems)


def part_problem(stage: str, part: dict[str, Any], file: Path) -> str:
    """Return why a part of a recipe does not fit into the stage's quickstart, empty if it does."""
    quickstart, _ = read_yaml(ROOT / "recipes" / stage / "quickstart.yaml")
    if "mix" in part.get("data", {}):
        del quickstart["data"]["source"]
    merged = quickstart | {name: quickstart.get(name, {}) | section for name, section in part.items()}
    file.write_text(json.dumps(merged), encoding="utf-8")
    try:
        read_recipe(stage, str(file))
    except UserError as error:
        return f"{stage}: {error}"
    return ""


@pytest.mark.parametrize(("page", "code"), list(fences("python")), ids=_ids)
def test_python_compiles_and_calls_what_exists(page: str, code: str) -> None:
    tree = ast.parse(code)
    ours = dict(_imports(tree))
    assert ours or "from align" not in code
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id in ours:
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(ours[call.func.id]).bind_partial(*[None] * len(call.args), **keywords)


def _imports(tree: ast.Module) -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield what a page imports from this project; a name that does not exist raises."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("align", "finetune"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                yield alias.asname or alias.name, getattr(module, alias.name)


@pytest.mark.parametrize(("page", "code"), list(fences("json")), ids=_ids)
def test_json_is_json(page: str, code: str) -> None:
    for document in [code] if code.lstrip().startswith(("[", "{\n")) else code.splitlines():
        assert json.loads(document) is not None


def test_verbs_of_the_pages_are_all_of_them() -> None:
    """Every visible command has an example on some page."""
    used = {stage_of_verb(words_of(line)[1]) for _, line in commands() if line.startswith("llm-align ")}
    visible = {stage_of_verb(name) for name, command in cli.commands.items() if not command.hidden}
    assert visible <= used
