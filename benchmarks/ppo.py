"""Proximal policy optimization, our stage against TRL's PPOTrainer: the same base, prompts and shapes.

    python3 -m venv trl110
    trl110/bin/pip install "torch==2.13.0" "trl==1.10.0" "transformers==5.24.*" "peft==0.21.2" click psutil
    make bench-ppo ARGS="--trl-python trl110/bin/python"

TRL 1.10 has a PPO trainer in ``trl.experimental.ppo``; 1.16, which the project pins, has none. So TRL runs
in an environment of its own, made as above, with current transformers and peft, and reads the same folder.
A Llama shape of 42M parameters
with random weights and a vocabulary of 32k; 24 prompts of 96 tokens, 8 per rollout, 64 new tokens each, 4
PPO epochs of one optimizer step over a rollout's 8 episodes.

Contenders: `native`, stage ppo as a user runs it, all roles on one base, with LoRA r = 16 on all linear
layers of policy and value, and a reward run; `trl`, full models (policy, its copy as reference, value,
reward); `trl-policy-lora`, TRL with a `peft_config`, whose reference is the base and whose value model is
fully trained; `trl-best`, LoRA on the value model too, so that it trains the same parameters as ours. Each
runs in a fresh process, in alternating order; training alone is timed, without loading. Before anything is
reported, both implementations' log-probabilities of the prompts under the policy are compared, and the amount
of work. Seconds mean little on a shared machine, so the last line gives ratios: the median over the repeats
of a contender's time to ours. Without `--trl-python` only ours is measured.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import RESULTS_DIR, environment_metadata, save_result, times_slower
from benchmarks.ppo_work import WORK_SIZES, BaseShape, prepare_work

NATIVE = "native"
TRL_CONTENDERS = ("trl", "trl-policy-lora", "trl-best")
SHAPES = {False: BaseShape(512, 8, 1376), True: BaseShape(64, 2, 172)}
"""Shapes of the base, by ``--small``: a smoke test has a small one."""
LOGP_TOLERANCE = {False: 1e-5, True: 2e-2}
"""Tolerated relative difference of a prompt's log-probability: float32; bfloat16, which has three digits."""


def run_contender(
    folder: Path, contender: str, *, trl_python: str, environment: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Run a contender in a process of its own, and return its measurements.

    Args:
        folder: written by ``prepare_work``.
        contender: of this benchmark or of `benchmarks.ppo_memory`.
        trl_python: the interpreter of TRL's environment.
        environment: further variables of the process.

    Raises:
        CalledProcessError: it failed; its stderr was printed.
    """
    is_native = contender not in TRL_CONTENDERS
    module = "benchmarks.ppo_native" if is_native else "benchmarks.ppo_trl"
    python = sys.executable if is_native else trl_python
    command = [python, "-m", module, str(folder), "--contender", contender]
    root = Path(__file__).parents[1]
    variables = {**os.environ, **environment}
    output = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=root, env=variables
    ).stdout
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {"contender": contender, **measured}


def logp_difference(folder: Path, work: dict[str, Any], trl_logps: list[float]) -> float:
    """Return the largest relative difference between our prompt log-probabilities and TRL's."""
    dtype = torch.bfloat16 if work["bfloat16"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    ids = torch.tensor(work["prompts"])
    with torch.no_grad():
        # Shifted: the logits at a position predict the next token. float32, so that rounding of the softmax
        # is not compared.
        logps = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    our_logps = logps.gather(-1, ids[:, 1:, None]).sum((1, 2))
    other_logps = torch.tensor(trl_logps)
    return float(((our_logps - other_logps).abs() / other_logps.abs()).max())


def check_equal_work(runs: list[dict[str, Any]], work: dict[str, Any]) -> None:
    """Raise AssertionError if contenders did different amounts of work."""
    for run in runs:
        assert run["episodes"] == work["episodes"], f"{run['contender']}: {run['episodes']} episodes"
        assert run["rollouts"] == work["episodes"] // work["rollout"], run["contender"]
        # Ours stops at EOS, which a random model rarely samples; TRL's episodes all have full length.
        tokens = run.get("new_tokens", work["new_tokens"])
        assert tokens > 0.98 * work["new_tokens"], f"{run['contender']}: {tokens} tokens per episode"


def summarize(runs: list[dict[str, Any]], contenders: tuple[str, ...]) -> dict[str, Any]:
    """Return medians over the repeats: episodes/s, peak memory, ratios, and our time by part."""
    runs_by_contender = {name: [run for run in runs if run["contender"] == name] for name in contenders}
    median = statistics.median
    native = runs_by_contender[NATIVE]
    return {
        "episodes_per_second": {
            name: median(run["episodes"] / run["seconds"] for run in own_runs)
            for name, own_runs in runs_by_contender.items()
        },
        "peak_memory_gib": {
            name: median(run["peak_memory_gib"] for run in own_runs)
            for name, own_runs in runs_by_contender.items()
        },
        "times_slower_than_native": times_slower(runs, contenders),
        "native_seconds": {
            phase: median(run["split"][phase] for run in native) for phase in native[0]["split"]
        },
    }


@click.command()
@click.option("--trl-python", default="", help="The interpreter of the environment with TRL 1.10.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--bfloat16", is_flag=True, help="bfloat16 in place of float32, for all contenders.")
@click.option("--small", is_flag=True, help="A model of two narrow layers, as a smoke test.")
@click.option("--save", is_flag=True, help=f"Write the result to {RESULTS_DIR.name}/.")
def main(trl_python: str, repeats: int, bfloat16: bool, small: bool, save: bool) -> None:
    """Measure, and print the ratios on the last line."""
    contenders = (NATIVE, *TRL_CONTENDERS) if trl_python else (NATIVE,)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        work = prepare_work(folder, SHAPES[small], bfloat16=bfloat16)
        for repeat in range(repeats):
            # Alternating order, so that a drift of the machine hits all contenders alike.
            for contender in contenders if repeat % 2 == 0 else reversed(contenders):
                runs.append({"repeat": repeat, **run_contender(folder, contender, trl_python=trl_python)})
                logps = runs[-1].pop("prompt_logps", None)
                if logps is not None:
                    difference = logp_difference(folder, work, logps)
                    assert difference < LOGP_TOLERANCE[bfloat16], (
                        f"{contender}: log-probabilities differ by {difference}"
                    )
                    runs[-1]["logps_differ_by"] = difference
                click.echo(json.dumps(runs[-1]))
    check_equal_work(runs, work)
    result = {
        **environment_metadata(bfloat16=bfloat16),
        **{name: work[name] for name in (*WORK_SIZES, "episodes", "epochs")},
        **asdict(SHAPES[small]),
        **summarize(runs, contenders),
        "runs": runs,
    }
    if save:
        save_result("ppo", result)
    print_results(result)


def print_results(result: dict[str, Any]) -> None:
    """Print the results, the ratios last."""
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in result["native_seconds"].items())
    click.echo(f"native, per run: {seconds}")
    for name in ("episodes_per_second", "peak_memory_gib"):
        values = ", ".join(f"{contender} {value:.2f}" for contender, value in result[name].items())
        click.echo(f"{name.replace('_', ' ')}: {values}")
    ratios = ", ".join(f"{name} {value:.2f}x" for name, value in result["times_slower_than_native"].items())
    click.echo(f"time of others / native: {ratios or 'not measured (no --trl-python)'}")


if __name__ == "__main__":
    main()
