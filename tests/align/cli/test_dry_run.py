"""``llm-align STAGE --dry-run``: it validates everything, imports nothing heavy, and writes nothing."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from align import cli
from finetune.recipe.discovery import stage_names, verb_of
from finetune.recipe.runs import FORMAT

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "deepspeed", "bitsandbytes")
PROGRAM = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"no module named {{name}} here")
sys.meta_path.insert(0, Refuse())
from align import cli
sys.argv = ["llm-align", "ppo", "--dry-run"]
cli.main()
"""
Call = Callable[..., tuple[int, list[str], str]]
PAIR = {"chosen": "hi", "rejected": "no"}
REPLIES: dict[str, dict[str, object]] = {"dpo": PAIR, "reward": PAIR, "chain_of_hindsight": PAIR}
REPLIES |= {"sft": {"completion": "hi"}, "kto": {"completion": "hi", "label": True}}
"""What a row of each stage has besides its prompt; RL has prompts alone."""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Return a function from arguments to exit status, the lines of stdout, and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune.distributed.hardware._query_nvidia_smi", list)

    def run(*arguments: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["llm-align", *arguments, "--dry-run"])
        status = 0
        try:
            cli.main()
        except SystemExit as exit_error:
            status = int(exit_error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return run


def write_run(path: str, *, status: str) -> None:
    """Write the record of a run of sft/quickstart into the folder that a dry run printed."""
    record = {"format": FORMAT, "status": status, "stage": "sft", "recipe": "quickstart"}
    record |= {"digest": path[-8:], "reload": {}, "files": {"adapter/adapter_model.safetensors": "0" * 64}}
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / "run.json").write_text(json.dumps(record))


def test_it_needs_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    program = [sys.executable, "-c", PROGRAM.format(heavy=HEAVY)]
    result = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("dry run  valid; nothing was run or written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", stage_names())
def test_every_quickstart_is_valid(call: Call, tmp_path: Path, stage: str) -> None:
    status, lines, err = call(verb_of(stage))
    assert (status, err) == (0, "") and list(tmp_path.iterdir()) == []
    assert lines[0].startswith(f"{stage} quickstart")
    assert lines[-2] == "launch   1 process, single, on the CPU"
    assert re.fullmatch(rf"run      {stage} quickstart: starts in runs/{stage}-quickstart-\S+.*", lines[-3])


def test_runs_that_come_first_are_named(call: Call) -> None:
    *_, first, run, _, _ = call("dpo")[1]
    assert (match := re.fullmatch(r"first    sft quickstart: starts in (runs/sft-quickstart-\w{8})", first))
    assert run.endswith("starts in runs/dpo-quickstart-* (the name depends on the run before it)")
    write_run(match[1], status="interrupted")
    assert f"first    sft quickstart: resumes (interrupted) in {match[1]}" in call("dpo")[1]
    write_run(match[1], status="finished")
    *_, first, run, _, _ = call("dpo", "--force")[1]
    assert first == f"uses     sft quickstart: finished in {match[1]}"
    assert re.fullmatch(r"run      dpo quickstart: starts in runs/dpo-quickstart-\w{8}", run)


def test_an_earlier_run_is_finished_resumed_or_replaced(call: Call) -> None:
    path = call("sft", "train.max_steps=3")[1][-3].split()[-1]
    actions = {"finished": "finished", "failed": "resumes (failed)", "interrupted": "resumes (interrupted)"}
    for status, action in actions.items():
        write_run(path, status=status)
        assert call("sft", "train.max_steps=3")[1][-3] == f"run      sft quickstart: {action} in {path}"
    forced = call("sft", "train.max_steps=3", "--force")[1][-3]
    assert forced == f"run      sft quickstart: starts over in {path}"


def test_settings_are_those_of_this_machine(call: Call) -> None:
    _, lines, _ = call("ppo", "train.num_processes=2", "train.strategy=zero2")
    assert lines[-2] == "launch   2 processes, zero2, on the CPU"
    _, lines, _ = call("dpo", "--adapter", "adamix", "model.init_from=null")
    changed = [line.split() for line in lines if line.split()[-1:] == ["solver"]]
    assert changed == [["adapter.consistency", "false", "solver"]]


def test_all_mistakes_are_in_one_message(call: Call, tmp_path: Path) -> None:
    Path("judge.py").write_text("def judge(prompt):\n    return 1\n")
    Path("taken").write_text("")
    graders = "evaluate.graders={a: judge.py:nope, b: judge.py:judge}"
    status, lines, err = call("sft", graders, "--out", "taken")
    assert (status, lines) == (2, []) and err.startswith("llm-align: 3 problems\n")
    assert "evaluate.graders.a: 'judge.py' has no function 'nope'" in err
    assert "evaluate.graders.b: judge(prompt) takes no `completion`" in err
    assert "--out taken: a file" in err
    status, lines, err = call("sft", graders, "train.strategy=ddp")
    assert (status, lines) == (2, []) and "ddp, with 1 process" in err and "no function 'nope'" in err
    status, _, err = call("sft", "--data", "nowhere.jsonl")
    assert status == 2 and "data.source (command line): 'nowhere.jsonl' does not exist" in err
    assert call("sft", "--data", "somebody/some-data")[0] == 0, "the hub is not contacted"
    status, _, err = call("dpo", "--from", "sft-quickstart")
    assert status == 2 and "there is no run 'sft-quickstart'" in err
    assert {path.name for path in tmp_path.iterdir()} <= {"judge.py", "taken", "__pycache__"}


@pytest.mark.parametrize("stage", [stage for stage in stage_names() if stage != "pretrain"])
def test_examples_in_the_help_are_valid(call: Call, stage: str) -> None:
    rows = [{"prompt": f"Hi {number}", **REPLIES.get(stage, {})} for number in range(1500)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("reward.py").write_text("def reward(prompt, completion):\n    return 0.0\n", encoding="utf-8")
    lines = str(cli.cli.commands[verb_of(stage)].epilog).splitlines()
    examples = [line.split("  ")[1].split()[1:] for line in lines if "--base" in line or "--data" in line]
    assert len(examples) == 2
    for arguments in examples:
        assert call(*arguments)[0] == 0, arguments


def test_parameters_of_functions_are_checked_against_the_columns(call: Call) -> None:
    Path("q.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 300, encoding="utf-8")
    Path("mine.py").write_text(
        "def fine(completion, answer): return 1\ndef wrong(completion, answr): return 1\n", encoding="utf-8"
    )
    words = ("grpo", "quickstart", "--data", "q.jsonl", "evaluate.graders={}")
    assert call(*words, "--reward", "mine.py:fine")[0] == 0
    status, _, err = call(*words, "--reward", "mine.py:wrong")
    assert status == 2 and "nothing fills the parameter 'answr'" in err and "did you mean 'answer'?" in err


def test_one_reward_replaces_the_recipe_s_two(call: Call) -> None:
    Path("reward.py").write_text("def reward(prompt, completion):\n    return 0.0\n", encoding="utf-8")
    status, lines, err = call("rejection", "llama2-chat", "--reward", "reward.py:reward")
    text = " ".join(" ".join(lines).split())
    assert (status, err) == (0, "") and 'rewards.combine "sum" default' in text
    assert "rewards.combine='llama2' (llama2-chat.yaml:37) is ignored: it combines the recipe's two" in text
    # Two of one's own keep the combination, which is then checked.
    status, _, err = call("rejection", "llama2-chat", "rewards.sources=[reward.py:reward, reward.py:reward]")
    assert status == 2 and "two sources named helpfulness and safety" in err
