"""Train 10 steps of the quickstarts in two checkouts and require equal losses, metrics and weights.

A refactoring keeps every run bit-identical. Two checkouts train the same steps on this machine, one after the
other, and everything that a run records of its training is compared exactly: each line of metrics.jsonl, the
final metrics of run.json, and the saved weights, tensor by tensor. Names of metrics and recipe keys that the
newer checkout renamed are translated with the table (see ``renames.py``).

    python tools/compare_losses.py ../before . --table tools/renames.tsv --stages sft dpo ppo
    python tools/compare_losses.py ../before . --table tools/renames.tsv

Each checkout has a cache of its own, and its dpo, kto, ppo and the rest start from its own 10-step sft run.
Exit status: 0 all equal, 1 a difference, 2 a run failed.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from renames import Renames, read_renames
from safetensors.torch import load_file

STAGES = ("sft", "pretrain", "dpo", "kto", "reward", "ppo", "rejection", "rloo", "grpo", "chain-of-hindsight")
TRL_STAGES = ("sft", "dpo", "reward")
"""Stages that TRL's trainer runs too, with ``train.engine=trl``."""
TRL_EXTRA = {"dpo": ("dpo.loss=dpo",)}
"""Overrides with TRL's engine, which does not have the quickstart's loss."""
FROM_SFT = ("dpo", "kto", "ppo", "rejection", "rloo", "grpo")
WITH_REWARD = ("ppo", "rejection", "rloo", "grpo")
COMMON = (
    "train.max_steps={steps}",
    "train.log_every=1",
    "evaluate.samples=2",
    "evaluate.max_new_tokens=8",
)
"""What keeps a run short. Sampled texts are compared too, so a few tokens of two samples stay."""
EXTRA = {
    "sft": ("evaluate.exact_match=0",),
    "ppo": (
        "ppo.rollout_size=32",
        "sampling.max_new_tokens=16",
        "evaluate.grader_rows=8",
        "evaluate.retention_rows=8",
    ),
    "rejection": (
        "rejection.rounds=1",
        "rejection.prompts=16",
        "sampling.max_new_tokens=16",
        "evaluate.grader_rows=8",
        "evaluate.retention_rows=8",
    ),
    "dpo": ("evaluate.grader_rows=8", "evaluate.retention_rows=8"),
    "chain-of-hindsight": ("evaluate.grader_rows=8",),
    "rloo": ("sampling.max_new_tokens=16", "evaluate.grader_rows=8", "evaluate.retention_rows=8"),
    "grpo": ("sampling.max_new_tokens=16", "evaluate.grader_rows=8", "evaluate.retention_rows=8"),
}
"""Overrides in the older checkout's keys."""
TIMES = ("seconds", "time/", "runtime", "per_second", "memory")
"""Parts of names of metrics that measure the machine and not the run."""


@dataclass
class Checkout:
    """One side: a folder with the source, where its runs go, and its names."""

    folder: Path
    out: Path
    python: str
    renames: Renames = field(default_factory=Renames)

    def run(self, case: str, steps: int, sft: Path | None, reward: Path | None) -> Path:
        """Train one case in a process of its own and return its run directory.

        Raises:
            RuntimeError: the command failed; the message has the end of its output.
        """
        stage, _, engine = case.partition("@")
        folder = self.out / case.replace("@", "-")
        verb = self.renames.stage(stage)
        overrides = [text.format(steps=steps) for text in (*COMMON, *EXTRA.get(stage, ()))]
        if engine:
            overrides += [f"train.engine={engine}", *TRL_EXTRA.get(stage, ())]
        command = [self.python, "-m", "align", verb, "quickstart", "--out", str(folder)]
        if stage in FROM_SFT:
            command += ["--from", str(sft)]
        if stage in WITH_REWARD:
            command += ["--reward", str(reward)]
        command += [self.renames.override(text, stage) for text in overrides]
        environment = os.environ | {
            "PYTHONPATH": str(self.folder),
            "XDG_CACHE_HOME": str(self.out / "cache"),
            "OMP_NUM_THREADS": "1",  # one thread: sums in one order, whatever else the machine does
        }
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.folder}: {' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
        return folder


def numbers(run: Path, renames: Renames, stage: str) -> dict[str, Any]:
    """Return all that a run recorded of its training, by name, in the newer checkout's names."""
    values: dict[str, Any] = {}
    for index, text in enumerate((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        values |= {
            f"metrics.jsonl:{index}:{key}": value for key, value in _named(json.loads(text), renames, stage)
        }
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    values |= {f"run.json:{key}": value for key, value in _named(record["metrics"], renames, stage)}
    for index, text in enumerate((run / "samples.jsonl").read_text(encoding="utf-8").splitlines()):
        values[f"samples.jsonl:{index}"] = sorted(map(str, json.loads(text).values()))
    for file in sorted([*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]):
        values |= {f"{file.name}:{name}": tensor for name, tensor in _tensors(file)}
    return values


def _named(record: Mapping[str, Any], renames: Renames, stage: str) -> Iterator[tuple[str, Any]]:
    """Yield the metrics that do not measure the machine, nested ones flattened."""
    for key, value in record.items():
        name = renames.metric(key, stage)
        if any(part in name or part in key for part in TIMES):
            continue
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", one) for inner, one in _named(value, renames, stage))
        else:
            yield name, value


def _tensors(file: Path) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name with its type, shape and a digest of its bytes."""
    for name, tensor in sorted(load_file(str(file)).items()):
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each value that is on one side alone or not exactly equal."""
    lines = [f"only before: {name} = {old[name]!r}" for name in sorted(old.keys() - new.keys())]
    lines += [f"only after: {name} = {new[name]!r}" for name in sorted(new.keys() - old.keys())]
    both = sorted(old.keys() & new.keys())
    return lines + [
        f"{name}: {old[name]!r} != {new[name]!r}" for name in both if repr(old[name]) != repr(new[name])
    ]


def cases(stages: Sequence[str]) -> list[str]:
    """Return the runs to make, each before those that start from it.

    >>> cases(["ppo"])
    ['sft', 'reward', 'ppo']
    """
    wanted = set(stages)
    if wanted & {*FROM_SFT}:
        wanted.add("sft")
    if wanted & {*WITH_REWARD}:
        wanted.add("reward")
    first = [stage for stage in ("sft", "reward") if stage in wanted]
    trl = [f"{stage}@trl" for stage in TRL_STAGES if stage in stages]
    return first + [stage for stage in STAGES if stage in wanted and stage not in first] + trl


def compare(old: Checkout, new: Checkout, names: Sequence[str], steps: int) -> int:
    """Run each case on both sides, print what differs, and return the exit status."""
    runs: dict[tuple[str, str], Path] = {}
    status = 0
    for case in names:
        values = []
        for side, checkout in (("old", old), ("new", new)):
            sft, reward = runs.get((side, "sft")), runs.get((side, "reward"))
            try:
                runs[side, case] = checkout.run(case, steps, sft, reward)
            except RuntimeError as error:
                print(f"{case}: FAILED\n{error}", flush=True)
                return 2
            names_of = new.renames if side == "old" else Renames()
            values.append(numbers(runs[side, case], names_of, case.partition("@")[0]))
        lines = differences(*values)
        tensors = sum(".safetensors:" in name for name in values[0])
        verdict = f"{len(lines)} DIFFER" if lines else "equal"
        print(f"{case}: {verdict} ({len(values[0])} values, {tensors} tensors)")
        print("".join(f"    {line[:300]}\n" for line in lines[:40]), end="", flush=True)
        status = status or int(bool(lines))
    return status


def main() -> int:
    """Read the command line and compare."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("old", type=Path, help="the checkout before")
    parser.add_argument("new", type=Path, help="the checkout after")
    parser.add_argument("--table", type=Path, help="names that the newer checkout changed")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter of the environment for both"
    )
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    words = parser.parse_args()
    renames = read_renames(words.table) if words.table else Renames()
    with tempfile.TemporaryDirectory() as folder:
        out = (words.out or Path(folder)).resolve()
        old = Checkout(words.old.resolve(), out / "old", words.python)
        new = Checkout(words.new.resolve(), out / "new", words.python, renames)
        return compare(old, new, cases(words.stages), words.steps)


if __name__ == "__main__":
    sys.exit(main())
