"""Time and peak memory of SFT over the micro-batch size, each in a new process, as a user starts it.

    make bench-sft_memory ARGS="--base ~/smollm2 --data gsm8k/train.jsonl"

LoRA r = 16 with the recipe's dropout, batch size 8. ``auto`` is what the recipe chooses by itself. Peak
memory is the resident memory of the whole process as the kernel reports it (``ru_maxrss``, the number of
``/usr/bin/time -v``), seconds are those of the training alone. ``--allocators`` repeats each size with other
allocators, where they are installed. ``--before FOLDER`` runs another checkout of this project next to it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from ctypes.util import find_library
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.common import RESULTS_DIR, environment_metadata, save_result

EMBEDDED_ROWS = "recipes/tiny/data/sft_train.jsonl"
PROJECT = Path(__file__).parents[1]
MIB = 2**20


@dataclass(frozen=True)
class ProcessUsage:
    """What a finished process took.

    Attributes:
        seconds: of training, by its own record.
        peak_mib: largest resident memory.
        page_faults: without disk access: pages that the kernel cleared and mapped.
        system_seconds: of processor time in the kernel.
    """

    seconds: float
    peak_mib: int
    page_faults: int
    system_seconds: float


def run_process(command: Sequence[str], environment: Mapping[str, str]) -> ProcessUsage:
    """Run a command to its end and return its usage; ``seconds`` is left at 0.

    Raises:
        click.ClickException: it failed; the message has the end of its output.
    """
    with tempfile.TemporaryFile("w+") as output:
        # A process of its own: the kernel's peak is that of all that a process has done.
        process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise click.ClickException(f"{' '.join(command)}\n{output.read()[-2000:]}")
    return ProcessUsage(0.0, usage.ru_maxrss // 2**10, usage.ru_minflt, round(usage.ru_stime, 1))


def recorded_seconds(run: Path) -> float:
    """Return the seconds of training that a run recorded."""
    return round(float(json.loads((run / "run.json").read_text(encoding="utf-8"))["seconds"]["train"]), 1)


def sft_command(settings: "SftSettings", out: Path, *, micro_batch_size: str) -> list[str]:
    """Return the command line of a run."""
    return [
        *(sys.executable, "-m", "align", "sft", "alpaca", "--base", settings.base, "--data", settings.data),
        *("data.template=tokenizer", "data.held_out=0", "adapter.rank=16", "train.batch_size=8"),
        *("train.epochs=1", "evaluate.samples=0", f"model.precision={settings.precision}"),
        *([f"train.max_steps={settings.max_steps}"] if settings.max_steps else []),
        *(f"train.micro_batch_size={micro_batch_size}", "--out", str(out)),
    ]


@dataclass(frozen=True)
class SftSettings:
    """What all runs share; ``max_steps`` 0: all rows once."""

    base: str
    data: str
    precision: str
    max_steps: int


def measure(
    settings: SftSettings, checkout: Path, *, micro_batch_size: str, preload: str = ""
) -> ProcessUsage:
    """Train in a new process of a checkout, with another allocator where ``preload`` names its library."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment |= {"LD_PRELOAD": preload} if preload else {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        usage = run_process(sft_command(settings, out, micro_batch_size=micro_batch_size), environment)
        return ProcessUsage(**(asdict(usage) | {"seconds": recorded_seconds(out)}))


def contenders(before: str | None, *, allocators: bool) -> Iterator[tuple[str, Path, str]]:
    """Yield name, checkout and preloaded library of each program."""
    yield "llm-align", PROJECT, ""
    if before:
        yield "before", Path(before), ""
    if allocators:
        for name in ("tcmalloc", "jemalloc"):
            if library := find_library(name):
                yield f"llm-align, {name}", PROJECT, library


@click.command()
@click.option("--base", required=True, help="A folder with a base and its tokenizer.")
@click.option("--data", default=EMBEDDED_ROWS, show_default=True, help="Rows in a layout that recipes take.")
@click.option("--micro", default="auto,8,4,2,1", show_default=True, help="Micro-batch sizes.")
@click.option("--precision", default="bfloat16", show_default=True)
@click.option("--max-steps", default=0, show_default=True, help="Optimizer steps; 0: all rows once.")
@click.option("--repeats", default=1, show_default=True, help="Runs of each, in alternating order.")
@click.option("--allocators", is_flag=True, help="Also with each allocator that is installed.")
@click.option("--before", help="A second checkout of this project, for comparison.")
@click.option("--save", is_flag=True, help=f"Write the result to {RESULTS_DIR.name}/.")
def main(
    base: str,
    data: str,
    micro: str,
    precision: str,
    max_steps: int,
    repeats: int,
    allocators: bool,
    before: str | None,
    save: bool,
) -> None:
    """Measure, and print a row for each run."""
    settings = SftSettings(base, data, precision, max_steps)
    cases = [
        (size, *contender)
        for size in micro.split(",")
        for contender in contenders(before, allocators=allocators)
    ]
    runs = []
    click.echo(f"{'micro-batch':>11} {'seconds':>8} {'peak MiB':>9} {'faults':>11} {'kernel s':>9}  program")
    for repeat in range(repeats):
        for size, name, checkout, preload in cases if repeat % 2 == 0 else reversed(cases):
            usage = measure(settings, checkout, micro_batch_size=size, preload=preload)
            runs.append({"program": name, "micro_batch_size": size, "repeat": repeat, **asdict(usage)})
            click.echo(
                f"{size:>11} {usage.seconds:8.1f} {usage.peak_mib:9,} {usage.page_faults:11,} "
                f"{usage.system_seconds:9.1f}  {name}"
            )
    if save:
        named = {"base": Path(base).name, "data": Path(data).name, "max_steps": max_steps}
        environment = environment_metadata(bfloat16=precision == "bfloat16")
        save_result("sft_memory", {**environment, **named, "runs": runs})


if __name__ == "__main__":
    main()
