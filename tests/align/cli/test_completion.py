"""Shell completion: what a key press offers, in click's own words and in real shells."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class

from align import cli
from align.cli.completion import KINDS
from align.cli.listing import names_by_kind
from finetune.recipe.discovery import stage_names, verb_of
from finetune.recipe.runs import FORMAT

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "deepspeed", "numpy")
PROGRAM = """#!{python}
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"no module named {{name}} here")
sys.meta_path.insert(0, Refuse())
sys.path[:0] = {path!r}
from align.cli import main
main()
"""
KEYS = [
    ("sft", "train.strat", ["train.strategy="]),
    ("sft", "train.strategy=z", ["train.strategy=zero1", "train.strategy=zero2", "train.strategy=zero3"]),
    ("sft", "data.packing=", ["data.packing=true", "data.packing=false"]),
    ("sft", "train.micro_batch_size=", ["train.micro_batch_size=auto"]),
    ("sft", "train.epochs=", []),
    ("sft", "train.max_steps=", []),
    ("sft", "data.template=ch", ["data.template=chatml"]),
    ("sft", "adapter.method=qlo", ["adapter.method=qlora"]),
    ("sft", "adapter.ra", ["adapter.rank="]),
    ("sft --adapter prefix", "adapter.vir", ["adapter.virtual_tokens="]),
    ("sft adapter.method=prefix", "adapter.vir", ["adapter.virtual_tokens="]),
    ("sft alpaca-prefix", "adapter.vir", ["adapter.virtual_tokens="]),
    ("sft --adapter prefix", "adapter.ra", []),
    ("sft", "da", ["data."]),
    ("coh", "chain_of_hindsight.g", ["chain_of_hindsight.good="]),
    ("dpo", "dpo.loss=ip", ["dpo.loss=ipo"]),
    ("dpo", "dpo.loss.nll", ["dpo.loss.nll_weight="]),
    ("dpo dpo.loss=ipo", "dpo.loss.nll", []),
    ("ppo", "rewards.sources=reward/q", ["rewards.sources=reward/quickstart"]),
    ("show --stage ppo", "ppo.kl_c", ["ppo.kl_coef="]),
    ("plan dpo/quickstart", "dpo.loss=ip", ["dpo.loss=ipo"]),
    ("run zephyr", "dp", ["dpo."]),
    ("run zephyr", "dpo.dpo.loss=ip", ["dpo.dpo.loss=ipo"]),
    ("run nowhere", "dp", []),
    ("sft", "nowhere.key=", []),
]
NAMES = [
    ("", "pre", ["pretrain"]),
    ("sft", "alpaca-q", ["alpaca-qlora"]),
    ("sft alpaca", "alpaca-q", []),
    ("sft", "--dry", ["--dry-run"]),
    ("sft --base", "llama-2-13", ["llama-2-13b"]),
    ("sft", "--base=llama-2-13", ["--base=llama-2-13b"]),
    ("sft --adapter", "ptuning", ["ptuning", "ptuning_v2"]),
    ("sft --from", "sft/al", [f"sft/{name}" for name in ("alpaca", "alpaca-prefix")]),
    ("dpo --from", "sft-q", ["sft-quickstart-11111111"]),
    ("dpo --from", "runs/sft-q", ["runs/sft-quickstart-11111111"]),
    ("dpo", "model.init_from=sft-q", ["model.init_from=sft-quickstart-11111111"]),
    ("chat", "", ["reward-hh-22222222", "sft-quickstart-11111111"]),
    ("ppo --reward", "r", ["reward-hh-22222222", "reward/hh"]),
    ("plan --gpu", "rtx40", ["rtx4090", "rtx4080"]),
    ("plan --strategy", "fs", ["fsdp2"]),
    ("show --stage", "chain", ["chain-of-hindsight"]),
    ("show", "dpo/q", ["dpo/quickstart"]),
    ("list", "lo", ["losses"]),
    ("run", "zep", ["zephyr"]),
    ("completion", "", ["bash", "zsh", "fish"]),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with two finished runs and an interrupted one the working directory."""
    monkeypatch.chdir(tmp_path)
    runs = {"sft-quickstart-11111111": "finished", "sft-quickstart-3": "interrupted"}
    for name, status in (runs | {"reward-hh-22222222": "finished"}).items():
        record = {"format": FORMAT, "status": status, "stage": name.split("-")[0], "recipe": "a"}
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(record | {"digest": name[-8:], "reload": {}}))
    return tmp_path


def complete(words: str, incomplete: str) -> list[str]:
    shell_class = get_completion_class("fish")
    assert shell_class is not None
    shell = shell_class(cli.cli, {}, "llm-align", "_LLM_ALIGN_COMPLETE")
    return [item.value for item in shell.get_completions(words.split(), incomplete)]


@pytest.mark.parametrize(("words", "incomplete", "expected"), KEYS)
def test_settings(words: str, incomplete: str, expected: list[str]) -> None:
    assert complete(words, incomplete) == expected


@pytest.mark.parametrize(("words", "incomplete", "expected"), NAMES)
def test_names(words: str, incomplete: str, expected: list[str]) -> None:
    assert complete(words, incomplete)[: len(expected)] == expected
    assert expected or complete(words, incomplete) == []


def test_an_empty_word_offers_recipes_and_sections() -> None:
    offered = complete("dpo", "")
    assert offered[:2] == ["hh", "ko-hh"] and offered[-1] == "dpo." and "train." in offered
    assert "quickstart" not in complete("dpo hh", "") and "train." in complete("dpo hh", "")
    assert {verb_of(stage) for stage in stage_names()} <= set(complete("", ""))


def test_kinds_are_those_of_list(here: Path) -> None:
    shutil.rmtree(here / "runs")
    listed = names_by_kind()
    assert tuple(listed) == KINDS
    assert listed["adapters"]["lora"].startswith("LoRA: ")
    assert listed["templates"]["alpaca"].startswith("Stanford Alpaca's prompt")
    assert listed["bases"]["llama-2-7b"].startswith("meta-llama/Llama-2-7b-hf")
    assert listed["stages"]["sft"].startswith("Supervised fine-tuning")
    assert all(text for kind in ("adapters", "templates", "stages") for text in listed[kind].values())


def test_files_are_the_shell_s() -> None:
    shell = ShellComplete(cli.cli, {}, "llm-align", "_LLM_ALIGN_COMPLETE")
    for words, incomplete in (
        ("sft --data", "my"),
        ("sft", "./my"),
        ("score runs/a", "my"),
        ("sft --out", "m"),
    ):
        (item,) = shell.get_completions(words.split(), incomplete)
        assert (item.type, item.value) == ("file", incomplete)


@pytest.fixture
def program(here: Path) -> dict[str, str]:
    """Install a ``llm-align`` that fails where it imports a heavy library, and return the environment."""
    folder = here / "bin"
    folder.mkdir()
    script = PROGRAM.format(python=sys.executable, heavy=HEAVY, path=[str(Path(cli.__file__).parents[2])])
    (folder / "llm-align").write_text(script)
    (folder / "llm-align").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(here)}


def run_shell(command: list[str], program: dict[str, str]) -> list[str]:
    result = subprocess.run(command, env=program, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


BASH = """
compopt() {{ printf "%s\\n" "compopt $2"; }}
eval "$(llm-align completion bash)"
COMP_WORDS=({words}) COMP_CWORD={index}
_llm_align_completion llm-align
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # Bash separates words at = and :, and replaces the part after the last of them.
        ("sft train.strategy = zero", ["zero1", "zero2", "zero3"]),
        ("sft data.packing =", ["true", "false"]),
        ("sft --base = llama-2-13", ["llama-2-13b"]),
        ("sft train.epochs = 3 train.seed = 1 train.strat", ["compopt nospace", "train.strategy="]),
        ("sft evaluate.retention = a : b adapter.method = dor", ["dora"]),
        ("dpo --from sft/qui", ["sft/quickstart"]),
        ("sft trai", ["compopt nospace", "train."]),
        ("sft --data my", ["compopt default", ""]),
    ],
)
def test_bash(program: dict[str, str], words: str, expected: list[str]) -> None:
    parts = ["llm-align", *words.split()]
    script = BASH.format(words=" ".join(map(shlex.quote, parts)), index=len(parts) - 1)
    assert run_shell(["bash", "--norc", "-c", script], program) == expected


def test_a_word_after_a_space_is_a_new_one_in_bash(program: dict[str, str]) -> None:
    script = BASH.format(words="llm-align show dpo/quickstart train.seed = 1 ''", index=6)
    assert run_shell(["bash", "--norc", "-c", script], program)[-1] == "dpo."


ZSH = """
compdef() {{ : }}
compadd() {{ print -r -- "compadd $*"; print -rl -- $completions }}
_describe() {{ print -r -- "_describe $*"; print -rl -- $completions_with_descriptions }}
eval "$(llm-align completion zsh)"
words=({words}); CURRENT=$#words
_llm_align_completion
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh(program: dict[str, str]) -> None:
    lines = run_shell(["zsh", "-f", "-c", ZSH.format(words="llm-align sft train.strategy=zero")], program)
    assert lines[0] == "compadd -U -V unsorted -a completions"
    assert lines[1:] == ["train.strategy=zero1", "train.strategy=zero2", "train.strategy=zero3"]
    lines = run_shell(["zsh", "-f", "-c", ZSH.format(words="llm-align sft train.epo")], program)
    assert lines == [
        "_describe -V unsorted completions_with_descriptions -U -S ",
        "train.epochs=:number of epochs",
    ]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sft train.strategy=zero", ["train.strategy=zero1", "train.strategy=zero2", "train.strategy=zero3"]),
        ("sft train.epo", ["train.epochs=\tnumber of epochs"]),
        ("chat sft-q", ["sft-quickstart-11111111"]),
    ],
)
def test_fish(program: dict[str, str], line: str, expected: list[str]) -> None:
    command = f"llm-align completion fish | source; complete --do-complete 'llm-align {line}'"
    assert run_shell(["fish", "--no-config", "-c", command], program) == expected
