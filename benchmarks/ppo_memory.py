"""Benchmark of PPO's peak memory: all roles on one base, on a 4-bit base, and one full model per role.

    make bench-ppo_memory      or      python -m benchmarks.ppo_memory --hidden-size 1024 --layers 16

Policy, reference, reward and value in one process, one rollout of `benchmarks.ppo` with an update, each
contender in a fresh process. A model per role costs its weights: the larger the base relative to the
activations, the more sharing saves. The resident memory of the libraries alone is reported too.

Large blocks are returned to the system as soon as they are free (glibc's MALLOC_MMAP_THRESHOLD_). Without
that the peak of the same run was 1.1 GiB higher, and varied by as much from run to run: fragmentation, not
weights.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.common import RESULTS_DIR, environment_metadata, save_result
from benchmarks.ppo import TRL_CONTENDERS, run_contender
from benchmarks.ppo_native import CONTENDERS
from benchmarks.ppo_work import WORK_SIZES, BaseShape, prepare_work

MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


@click.command()
@click.option("--hidden-size", default=512, show_default=True, help="A multiple of 64, for NF4 blocks.")
@click.option("--layers", default=8, show_default=True)
@click.option("--trl-python", default="", help="As for `benchmarks.ppo`: measure TRL too.")
@click.option("--bfloat16", is_flag=True, help="bfloat16 in place of float32.")
@click.option("--save", is_flag=True, help=f"Write the result to {RESULTS_DIR.name}/.")
def main(hidden_size: int, layers: int, trl_python: str, bfloat16: bool, save: bool) -> None:
    """Measure, and print the peaks on the last line."""
    shape = BaseShape(hidden_size, layers, 11 * hidden_size // 4)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        prepare_work(folder, shape, bfloat16=bfloat16, rollouts=1, epochs=1)
        weights = (folder / "model" / "model.safetensors").stat().st_size / 2**30
        contenders = (*CONTENDERS, *TRL_CONTENDERS) if trl_python else CONTENDERS
        runs = [
            run_contender(folder, contender, trl_python=trl_python, environment=MALLOC_ENVIRONMENT)
            for contender in contenders
        ]
    for run in runs:
        click.echo(json.dumps({key: value for key, value in run.items() if key != "prompt_logps"}))
    result = _result(shape, weights, runs, bfloat16=bfloat16)
    if save:
        save_result(f"ppo_memory-{hidden_size}x{layers}", result)
    peaks = ", ".join(f"{name} {value:.2f}" for name, value in result["peak_memory_gib"].items())
    click.echo(f"base {weights:.2f} GiB, libraries {runs[0]['libraries_gib']:.2f} GiB; peak memory: {peaks}")


def _result(
    shape: BaseShape, weights: float, runs: list[dict[str, Any]], *, bfloat16: bool
) -> dict[str, Any]:
    return {
        **environment_metadata(bfloat16=bfloat16),
        **WORK_SIZES,
        "hidden_size": shape.hidden_size,
        "layers": shape.layers,
        "intermediate_size": shape.intermediate_size,
        "base_gib": weights,
        "peak_memory_gib": {run["contender"]: run["peak_memory_gib"] for run in runs},
        "libraries_gib": runs[0]["libraries_gib"],
    }


if __name__ == "__main__":
    main()
