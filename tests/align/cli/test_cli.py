"""The command line as a user meets it."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from align import cli, load_recipe, run
from finetune.training import fit

RECIPE = """\
stage: sft
description: sums
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 6, max_length: 128}}
adapter: {{method: lora, rank: 2}}
train: {{max_steps: 2, batch_size: 8, learning_rate: 1e-2}}
evaluate: {{samples: 1, max_new_tokens: 4}}
"""
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "accelerate",
    "matplotlib",
    "numpy",
)
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(tmp_path: Path, base_folder: Path, rows_file: Path) -> Path:
    path = tmp_path / "sums.yaml"
    path.write_text(RECIPE.format(base=base_folder, rows=rows_file))
    return path


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: Path
) -> Call:
    """Return a function: words in, exit status, output and errors out; in this process."""
    monkeypatch.chdir(tmp_path)

    def call_cli(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llm-align", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call_cli


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, rows_file: Path) -> Path:
    """Return a folder in which ``sft sums.yaml --out run`` has run, for tests to copy."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "sums.yaml").write_text(RECIPE.format(base=base_folder, rows=rows_file))
    with contextlib.chdir(folder):
        run(load_recipe("sums.yaml", out="run"), command="llm-align sft sums.yaml --out run")
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """Return the test's folder with that run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    present = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in present}


VERBS = ["", *sorted(cli.cli.commands)]
HELP = """
import sys
from align import cli
for verb in {verbs!r}:
    sys.argv = ["llm-align", *filter(None, [verb]), "--help"]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, verb
    print("HEAVY after", verb, sorted(set({heavy!r}) & set(sys.modules)))
"""


def test_pain_23_help_imports_nothing_heavy() -> None:
    program = HELP.format(verbs=VERBS, heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("HEAVY")] == [
        f"HEAVY after {verb} []" for verb in VERBS
    ]
    usages = [line.partition("[")[0].split()[2:] for line in lines if line.startswith("Usage:")]
    assert usages == [verb.split() for verb in VERBS]


def test_a_run_writes_its_folder_and_prints_the_next_command(call: Call, tmp_path: Path) -> None:
    status, out, _ = call("sft", "sums.yaml", "--out", "run")
    assert status == 0
    present = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "report.html", "adapter"} <= present
    assert "llm-align chat run" in out and "run/report.html" in out and "run/adapter" in out
    assert [name for name in present if name.endswith(".partial")] == []
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"] == "llm-align sft sums.yaml --out run" and record["status"] == "finished"


def test_the_usual_folder_is_named_after_stage_recipe_and_content(call: Call, tmp_path: Path) -> None:
    assert call("sft", "sums.yaml")[0] == 0
    assert call("sft", "sums.yaml", "train.seed=1")[0] == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(names) == 2 and all(len(name.removeprefix("sft-sums-")) == 8 for name in names)


def test_a_finished_run_returns_at_once(call: Call, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(done)
    monkeypatch.setattr(fit, "fit", lambda *_, **__: pytest.fail("it trains again"))
    status, out, _ = call("sft", "sums.yaml", "--out", "run")
    assert status == 0 and "llm-align chat run" in out
    assert files(done) == before


def test_force_retrains_bit_for_bit(call: Call, done: Path) -> None:
    first = files(done / "run")
    assert call("sft", "sums.yaml", "--out", "run", "--force")[0] == 0
    second = files(done / "run")
    weights = done / "run" / "adapter" / "adapter_model.safetensors"
    assert second[weights][0] > first[weights][0] and second[weights][1] == first[weights][1]
    assert second.keys() == first.keys()


def test_chat_answers_once(call: Call) -> None:
    assert call("sft", "sums.yaml", "--out", "run", "train.learning_rate=1e-6")[0] == 0
    ask = ("chat", "run", "--prompt", "Add the numbers.", "--max-new-tokens", "8")
    status, out, _ = call(*ask)
    assert status == 0 and out.strip()
    assert call(*ask) == (0, out, "")


def test_chat_runs_until_an_empty_line(call: Call, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Add the numbers.", "and again", "/new", "1 2", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    status, out, _ = call("chat", "run", "--max-new-tokens", "3")
    assert status == 0 and out.startswith("Chatting with run; empty line to quit")
    assert list(lines) == []


def test_pain_25_nan_exits_with_1_and_is_never_finished(call: Call, tmp_path: Path) -> None:
    status, out, err = call("sft", "sums.yaml", "--out", "run", "train.learning_rate=1e30", "train.warmup=0")
    assert status == 1
    assert "at step 2, on " in err and "sums.jsonl:" in err and "train.learning_rate" in err
    assert "Traceback" not in err and "next" not in out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    status, _, err = call("chat", "run", "--prompt", "a")
    assert status == 2 and "a run with status 'failed'" in err


def test_ctrl_c_exits_with_130(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("align.cli.stage_commands.run", interrupted)
    status, _, err = call("sft", "sums.yaml")
    assert status == 130
    expected = "llm-align: interrupted. The same command resumes from the last checkpoint, if there is one"
    assert err.strip() == expected


def test_version_is_one_line_of_any_checkout(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    # A checkout that is not installed has no metadata.
    monkeypatch.setattr("importlib.metadata.version", lambda name: pytest.fail(f"{name}: reads metadata"))
    assert call("--version") == (0, "llm-align 0.1.0\n", "")


def test_options_of_other_libraries_are_all_named(call: Call) -> None:
    words = ("--lora_r", "8", "--learning-rate=1e-4", "--bf16", "--train.epochs", "2", "--push_to_hub")
    status, _, errors = call("sft", "quickstart", *words)
    assert status == 2 and errors.startswith(
        "llm-align: 5 problems\n--lora_r: `lora_r` is `adapter.rank` here"
    )
    repairs = [line.partition("repair:   ")[2] for line in errors.splitlines() if "repair:" in line]
    assert repairs == [
        "adapter.rank=8",
        "train.learning_rate=0.0001",
        "model.precision=bfloat16",
        "train.epochs=2",
        "remove it",
    ]
    # The stage's own keys, and commands without a recipe.
    assert "--beta: `beta` is `kto.beta` here" in call("kto", "--beta", "0.1")[2]
    assert call("sft", "--colour", "red")[2].startswith("llm-align: No such option '--colour'.")
    assert call("chat", "run", "--beta", "1")[2].startswith("llm-align: No such option '--beta'.")
