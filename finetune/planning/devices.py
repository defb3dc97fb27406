"""GPU specs by name (memory, FLOP/s, bandwidth, utilization) and this machine's devices; without torch."""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.recipe.errors import Problem, UserError, nearest

GIB = 2**30
SURE = 0.95
"""Fraction of the available memory that an automatic choice may fill: the plan aims at an error below 5 %."""
USABLE = 0.98
"""Fraction of a card's nominal memory that PyTorch sees, if only its size is known: 23.6 of 24 GiB."""
DRIVER = 0.45
"""GiB that ``nvidia-smi`` counts and PyTorch does not see: 81,559 MiB and 79.2 GiB of an H100."""
TAKEN = {"cuda": GIB // 2, "cpu": GIB}
"""Bytes in use before a weight is loaded: CUDA's context and its libraries' buffers (0.4 to 0.6 GiB); on a
CPU the process itself (1 GiB: Python with torch, transformers, peft and trl)."""
Share = tuple[float, float]

# Hardware FLOPs utilization (HFU), from MosaicML, llm-foundry, scripts/train/benchmarking/README.md: training
# of 125M to 70B parameters. The lower ends are halved: theirs are pretraining on full rows.
HOPPER: Share = (0.18, 0.59)  # H100 in bfloat16: 35 to 59 %
AMPERE: Share = (0.21, 0.79)  # A100: 42 to 79 %
OTHERS: Share = (0.15, 0.90)  # torchtune's README: an 8B's LoRA, 3,083 tokens/s on an RTX 4090
CPUS: Share = (0.10, 0.60)


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or the machine's CPU.

    Attributes:
        name: its name on the command line.
        kind: ``cuda`` or ``cpu``.
        memory: bytes that PyTorch can allocate (for the CPU: the machine's memory).
        bfloat16: whether it has native bfloat16 arithmetic.
        flops_16bit: peak FLOP/s of dense 16-bit matrix products with 32-bit accumulation; 0: unknown.
        flops_float32: peak FLOP/s in float32, without TF32; 0: unknown.
        bandwidth: memory bandwidth in bytes per second; 0: unknown.
        utilization: lower and upper utilization of the peak in training.
    """

    name: str
    kind: str
    memory: int
    bfloat16: bool
    half: float
    single: float
    bandwidth: float
    used: Share

    @property
    def room(self) -> int:
        """Return the bytes available to a process that does not share the device."""
        return self.share(1)

    def share(self, processes: int) -> int:
        """Return the bytes available to each process: all of its GPU, or its fraction of the CPU's memory."""
        together = processes if self.kind == "cpu" else 1  # each process has a GPU of its own
        return self.memory // together - TAKEN[self.kind]

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s in a precision; 0: unknown."""
        return self.single if precision == "float32" else self.half


def _gpu(
    name: str,
    gib: float,
    rates: tuple[float, float, float],
    *,
    used: Share = OTHERS,
    bfloat16: bool = True,
) -> Device:
    half, single, bandwidth = rates
    return Device(name, "cuda", int(gib * GIB), bfloat16, half * 1e12, single * 1e12, bandwidth * 1e9, used)


# GiB: "total capacity" in PyTorch's messages on such cards (with ECC where it is on by default).
# Then TFLOP/s of dense 16-bit products (half of what data sheets give "with sparsity"; GeForce: summed in
# float32), TFLOP/s in float32, GB/s; from NVIDIA's data sheets and architecture papers.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 178.3, (2250, 75, 8000), used=HOPPER),
        _gpu("h200", 139.8, (989, 67, 4800), used=HOPPER),
        _gpu("h100", 79.2, (989, 67, 3350), used=HOPPER),
        _gpu("h100-pcie", 79.2, (756, 51, 2000), used=HOPPER),
        _gpu("a100-80g", 79.2, (312, 19.5, 2039), used=AMPERE),
        _gpu("a100-40g", 39.4, (312, 19.5, 1555), used=AMPERE),
        _gpu("l40s", 44.4, (362, 91.6, 864)),
        _gpu("rtx6000ada", 47.5, (364, 91.1, 960)),
        _gpu("a6000", 47.4, (155, 38.7, 768)),
        _gpu("a40", 44.4, (150, 37.4, 696)),
        _gpu("a10", 22.0, (125, 31.2, 600)),
        _gpu("a10g", 22.0, (70, 31.5, 600)),
        _gpu("l4", 22.0, (121, 30.3, 300)),
        _gpu("t4", 14.6, (65, 8.1, 300), bfloat16=False),
        _gpu("v100-32g", 31.7, (125, 15.7, 900), bfloat16=False),
        _gpu("v100-16g", 15.8, (125, 15.7, 900), bfloat16=False),
        _gpu("rtx5090", 31.4, (210, 105, 1792)),
        _gpu("rtx4090", 23.6, (165, 82.6, 1008)),
        _gpu("rtx4080", 15.6, (97.5, 48.7, 717)),
        _gpu("rtx3090", 23.7, (71, 35.6, 936)),
        _gpu("rtx3060", 11.8, (25.5, 12.7, 360)),
    )
}
OTHER_NAMES = {
    "a100": "a100-80g",
    "v100": "v100-16g",
    "4090": "rtx4090",
    "3090": "rtx3090",
    "5090": "rtx5090",
}
SPOKEN = {
    "h100pcie": "h100-pcie",
    "a100sxm440gb": "a100-40g",
    "a100pcie40gb": "a100-40g",
    "rtx6000ada": "rtx6000ada",
    "rtxa6000": "a6000",
    "v100sxm232gb": "v100-32g",
    "v100pcie32gb": "v100-32g",
}
"""The driver's names of cards that a prefix of the short name would confuse."""
SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:g|gb|gib)")


def device(text: str) -> Device:
    """Return a device by name, or a GPU of a memory size such as ``24GB``.

    Raises:
        UserError: the name is unknown.
    """
    name = text.strip().lower().replace("_", "-").removeprefix("nvidia-")
    if name == "cpu":
        return this_cpu()
    if size := SIZE.fullmatch(name.replace(" ", "")):
        gib = float(size[1])
        return replace(_gpu(f"a GPU of {gib:g} GB", gib * USABLE, (0, 0, 0)), used=OTHERS)
    known = {_letters(other): other for other in (*GPUS, *OTHER_NAMES)}
    if found := known.get(_letters(name)):
        return GPUS[OTHER_NAMES.get(found, found)]
    names = ", ".join(GPUS)
    repair = nearest(name, [*GPUS, *OTHER_NAMES]) or "any other card by its memory: --gpu 24GB"
    raise UserError(Problem("--gpu", f"'{text}' is unknown", f"{names}, cpu, or a size such as 24GB", repair))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def this_machine() -> tuple[Device, int]:
    """Return this machine's GPU as `nvidia-smi` reports it, or its CPU, and the number of devices."""
    gpus = _driver_lists()
    if not gpus:
        return this_cpu(), 1
    name, mebibytes = gpus[0]
    memory = int(mebibytes * 2**20 - DRIVER * GIB)
    return replace(_of_driver(name), name=name, memory=memory), len(gpus)


def _of_driver(name: str) -> Device:
    """Return the spec that matches the driver's name, or one of unknown speed."""
    letters = _letters(name)
    special = [short for spoken, short in SPOKEN.items() if spoken in letters]
    usual = [short for short in GPUS if _letters(short.removesuffix("-80g").removesuffix("-16g")) in letters]
    found = special or sorted(usual, key=len, reverse=True)
    return GPUS[found[0]] if found else _gpu(name, 0, (0, 0, 0))


def _driver_lists() -> list[tuple[str, int]]:
    """Return name and MiB of every GPU that ``nvidia-smi`` lists; empty if it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    words = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line.rsplit(",", 1) for line in ended.stdout.splitlines() if ended.returncode == 0]
    found = [(name.strip(), int(size)) for name, size in lines if size.strip().isdigit()]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")  # nvidia-smi ignores it, CUDA does not
    return found if seen is None else found[: len([one for one in seen.split(",") if one not in ("", "-1")])]


def this_cpu() -> Device:
    """Return the spec of this machine's CPU: the cores and memory that this process may use."""
    flags = _cpu_flags()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    wide = (
        32 if "avx512f" in flags else 16
    )  # products and sums of float32 in a cycle: two units of 16 or 8 lanes
    single = cores * 2 * wide * 2.5e9
    bfloat16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    name = f"the CPU ({cores} core{'s' if cores > 1 else ''}, {platform.machine()})"
    return Device(name, "cpu", _machine_memory(), bfloat16, (1 + bfloat16) * single, single, 20e9, CPUS)


def _cpu_flags() -> set[str]:
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(line[1].split()) if line else set()


def _machine_memory() -> int:
    """Return the machine's memory in bytes, or the container's (cgroup) limit if that is lower."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else ""
    return min(memory, int(text)) if text.isdigit() else memory
