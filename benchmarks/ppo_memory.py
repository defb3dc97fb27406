"""Peak memory of PPO: four roles on one base, on a base in 4 bits, and with a whole model for each role.

    make bench-ppo_memory      or      python -m benchmarks.ppo_memory --hidden-size 1024 --layers 16

Policy, reference, reward and value in one process, one rollout of `benchmarks.ppo` with an update, each
contender in a fresh process. What a role of its own costs is its weights: the larger the base beside the
activations, the more sharing saves. What the libraries have resident before anything is loaded is told too.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.common import RESULTS, facts, save_result
from benchmarks.ppo import measure
from benchmarks.ppo_native import CONTENDERS
from benchmarks.ppo_work import WORK, Shape, prepare


@click.command()
@click.option("--hidden-size", default=512, show_default=True, help="A multiple of 64, which 4 bits need.")
@click.option("--layers", default=8, show_default=True)
@click.option("--bfloat16", is_flag=True, help="bfloat16 in place of float32.")
@click.option("--save", is_flag=True, help=f"Write the result to {RESULTS.name}/.")
def main(hidden_size: int, layers: int, bfloat16: bool, save: bool) -> None:
    """Measure, and print the peaks on the last line."""
    shape = Shape(hidden_size, layers, 11 * hidden_size // 4)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        prepare(folder, shape, bfloat16=bfloat16, rollouts=1, epochs=1)
        weights = (folder / "model" / "model.safetensors").stat().st_size / 2**30
        runs = [measure(folder, contender, trl_python="") for contender in CONTENDERS]
    for one in runs:
        click.echo(json.dumps(one))
    result = _result(shape, weights, runs, bfloat16=bfloat16)
    if save:
        save_result(f"ppo_memory-{hidden_size}x{layers}", result)
    peaks = ", ".join(f"{name} {value:.2f}" for name, value in result["peak_memory_gib"].items())
    click.echo(f"base {weights:.2f} GiB, libraries {runs[0]['libraries_gib']:.2f} GiB; peak memory: {peaks}")


def _result(shape: Shape, weights: float, runs: list[dict[str, Any]], *, bfloat16: bool) -> dict[str, Any]:
    return {
        **facts(bfloat16=bfloat16),
        **WORK,
        "hidden_size": shape.hidden_size,
        "layers": shape.layers,
        "middle": shape.middle,
        "base_gib": weights,
        "peak_memory_gib": {one["contender"]: one["peak_memory_gib"] for one in runs},
        "libraries_gib": {one["contender"]: one["libraries_gib"] for one in runs},
    }


if __name__ == "__main__":
    main()
