"""``llm-align plan``: output, exit status, and no heavy imports."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align import cli
from finetune.distributed.hardware import RESERVED_BYTES

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "deepspeed", "bitsandbytes")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Return a function from arguments to exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llm-align", "plan", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as exit_error:
            status = int(exit_error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


PROGRAM = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"no module named {{name}} here")
sys.meta_path.insert(0, Refuse())
from align import cli
from finetune.distributed.hardware import RESERVED_BYTES
from finetune.distributed.hardware import RESERVED_BYTES
sys.argv = ["llm-align", "plan", *{words!r}]
try:
    cli.main()
except SystemExit as end:
    print("STATUS", end.code)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["alpaca", "--gpu", "rtx4090", "--fit"],
        ["hh", "--stage", "ppo", "--gpu", "a100-40g", "--json"],
        ["quickstart", "--stage", "dpo"],
    ],
    ids=" ".join,
)
def test_pain_20_plan_runs_without_torch(arguments: list[str]) -> None:
    program = PROGRAM.format(heavy=HEAVY, words=arguments)
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "STATUS" not in completed.stdout.replace("STATUS 3", ""), completed.stdout + completed.stderr


def test_plan_output(call: Call) -> None:
    status, out, _ = call("alpaca", "--gpu", "rtx4090")
    assert status == 0
    for fragment in (
        "Fits: peak",
        "activations",
        "logits and loss",
        "total",
        "19,988,480 of 6,758,404,096 parameters",
        "51,482 rows",
        "1,209 of 128 rows: 64 micro-batches of 2",
        "estimated:",
        "adapter 76 MiB",
        "model.precision=bfloat16",
        "llm-align sft alpaca",
    ):
        assert fragment in out, fragment


def test_misfit_exits_with_status_3(call: Call) -> None:
    status, out, _ = call("alpaca", "--base", "llama-2-70b", "--gpu", "rtx4090")
    assert status == 3 and out.splitlines()[1].startswith("Does not fit")
    assert "too little" in out and "--fit" in out


def test_fit_prints_the_command(call: Call) -> None:
    status, out, _ = call("alpaca", "--gpu", "t4", "--fit")
    last = [line for line in out.splitlines() if line.strip()][-1]
    assert status == 3 and last.startswith("next") and "llm-align sft alpaca model.precision=float16" in last
    assert "append to the command" in out and "(unchanged)" in out


def test_fit_without_needed_or_possible_changes(call: Call) -> None:
    assert "no change needed: llm-align sft alpaca" in call("alpaca", "--gpu", "h100", "--fit")[1]
    hopeless = call("alpaca", "--base", "llama-2-70b", "--gpu", "8GB", "--fit")[1]
    assert "no alternative fits" in hopeless


def test_json_output(call: Call) -> None:
    status, out, _ = call("alpaca", "--gpu", "rtx4090", "--json", "--fit")
    content: dict[str, Any] = json.loads(out)
    assert status == 0 and content["fits"] is True
    assert content["parameters"] == {"trained": 19_988_480, "total": 6_758_404_096}
    assert content["peak"]["bytes"] == max(
        phase["total"] for phase in content["phases"] if phase["name"] != "merge"
    )
    for phase in content["phases"]:
        assert phase["total"] == sum(phase["categories"].values())
    assert content["work"]["steps"] == 1209 and content["alternatives"][0]["append"]
    assert call("alpaca", "--gpu", "t4", "--json")[0] == 3


def test_unknown_row_counts_are_reported(call: Call) -> None:
    _, out, _ = call("vicuna", "--gpu", "h100")
    assert "unknown: epochs=3 over an unknown number of rows" in out and "--data FILE" in out
    fixed = call("vicuna", "--gpu", "h100", "train.max_steps=10")[1]
    assert "steps    10 of 128 rows: " in fixed and "unknown number" not in fixed


def test_a_gpu_given_by_size_has_no_time(call: Call) -> None:
    status, out, _ = call("alpaca", "--gpu", "24GB")
    assert status == 0 and "time     unknown" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("alpaca", "--gpu", "rtx4091"), "did you mean 'rtx4090'?"),
        (("alpaca", "--gpu", "cpu", "--gpus", "2"), "train.num_processes=2"),
        (("alpaca", "--base", "owner/unheard-of"), "hf download owner/unheard-of config.json"),
        (("alpaca", "--gpu", "h100", "--strategy", "zero3"), "train.num_processes=2 or more"),
        (("alpaca", "--strategy", "zero4"), "train.strategy"),
        (("nothing",), "stage sft has no such recipe"),
    ],
)
def test_mistakes_end_with_status_2_and_a_repair(
    call: Call, arguments: tuple[str, ...], expected: str
) -> None:
    status, out, err = call(*arguments)
    assert (status, out) == (2, "") and expected in err


def test_several_gpus_are_shown(call: Call) -> None:
    arguments = ("alpaca", "--adapter", "full", "--gpu", "a100-80g", "--gpus", "8", "--strategy", "zero3")
    status, out, _ = call(*arguments)
    assert status == 0 and "on 8 x a100-80g, zero3" in out and "memory per process" in out
    assert "llm-align sft alpaca --adapter full train.strategy=zero3" in out


def test_processes_on_one_cpu_divide_its_memory(call: Call) -> None:
    single, sharded = call("--json")[1], call("train.num_processes=2", "train.strategy=zero2", "--json")[1]
    devices = [json.loads(output)["device"] for output in (single, sharded)]
    for processes, device in enumerate(devices, 1):
        # Free memory is measured, and changes between two plans.
        memory = device["memory"] if device["free"] is None else device["free"]
        assert device["available"] == memory // processes - RESERVED_BYTES["cpu"]
        assert 0 < memory <= device["memory"]
    assert "free per process" in call("train.num_processes=2")[1]


def test_small_plans_are_in_mib(call: Call) -> None:
    status, out, _ = call()
    assert status == 0 and "memory of the run, MiB" in out and "llm-align sft" in out
