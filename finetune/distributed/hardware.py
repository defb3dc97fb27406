"""GPUs and CPUs: this process's device, as torch reports it, and a table of GPUs by name, for plans.

torch is imported late: a plan for this machine asks ``nvidia-smi``.
"""

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from ctypes.util import find_library
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.recipe.errors import Problem, UserError, did_you_mean

GIB = 2**30
SAFE_FRACTION = 0.95
"""Fraction of the available memory that an automatic choice may fill: the plan aims at an error below 5 %."""
USABLE_FRACTION = 0.98
"""Fraction of a card's nominal memory that PyTorch sees, if only its size is known: 23.6 of 24 GiB."""
DRIVER_GIB = 0.45
"""GiB that ``nvidia-smi`` counts and PyTorch does not see: 81,559 MiB and 79.2 GiB of an H100."""
RESERVED_BYTES = {"cuda": GIB // 2, "cpu": int(0.82 * GIB)}
"""Bytes in use before a weight is loaded: CUDA's context and its libraries' buffers (0.4 to 0.6 GiB); on a
CPU the process itself: Python with torch, transformers, peft and trl, and the buffers of kernels and
tokenizer. Measured: what runs on the bundled model take beyond the planned tensors (0.78 GiB for dpo, 0.84
for pretrain)."""
FASTER_ALLOCATOR_GAIN = "tcmalloc, measured: 15 % less time and 19 % less memory than with glibc"
"""Of SFT of a 135M model in bfloat16 on two cores: 85 s and 6.3 GiB instead of 106 s and 7.8 GiB."""
Utilization = tuple[float, float]

# Hardware FLOPs utilization (HFU), from MosaicML, llm-foundry, scripts/train/benchmarking/README.md: training
# of 125M to 70B parameters. The lower ends are halved: theirs are pretraining on full rows.
HOPPER: Utilization = (0.18, 0.59)  # H100 in bfloat16: 35 to 59 %
AMPERE: Utilization = (0.21, 0.79)  # A100: 42 to 79 %
OTHER_GPUS: Utilization = (0.15, 0.90)  # torchtune's README: an 8B's LoRA, 3,083 tokens/s on an RTX 4090
CPU: Utilization = (0.10, 0.60)


@dataclass(frozen=True, slots=True)
class Hardware:
    """The device of a process.

    Attributes:
        device: ``cpu`` or ``cuda``.
        name: the vendor's name for it.
        bfloat16: whether it has native bfloat16 arithmetic (emulation does not count).
        device_count: number of such devices in this machine; 1 for the CPU.
    """

    device: str
    name: str
    bfloat16: bool
    device_count: int = 1


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
        free: bytes of memory that other programs leave now, measured; None: not measured.
    """

    name: str
    kind: str
    memory: int
    bfloat16: bool
    flops_16bit: float
    flops_float32: float
    bandwidth: float
    utilization: Utilization
    free: int | None = None

    @property
    def available_bytes(self) -> int:
        """Return the bytes available to a process that does not share the device."""
        return self.available_bytes_per_process(1)

    def available_bytes_per_process(self, processes: int) -> int:
        """Return the bytes available to each process: all of its GPU, or its fraction of the CPU's memory."""
        sharing = processes if self.kind == "cpu" else 1  # each process has a GPU of its own
        return (self.memory if self.free is None else self.free) // sharing - RESERVED_BYTES[self.kind]

    @property
    def program_bytes(self) -> int:
        """Return the bytes of the program that a tool such as top counts for a process; 0 on a GPU."""
        return RESERVED_BYTES[self.kind] if self.kind == "cpu" else 0

    def hardware(self, count: int = 1) -> Hardware:
        """Return what a process detects on a machine with this many of them."""
        return Hardware(self.kind, self.name, self.bfloat16, count)

    def peak_flops(self, precision: str) -> float:
        """Return the peak FLOP/s in a precision; 0: unknown."""
        return self.flops_float32 if precision == "float32" else self.flops_16bit


def detect_hardware() -> Hardware:
    """Return the first GPU, or the CPU if there is none."""
    import torch

    if torch.cuda.is_available():
        return Hardware(
            "cuda",
            torch.cuda.get_device_name(0),
            torch.cuda.is_bf16_supported(including_emulation=False),
            torch.cuda.device_count(),
        )
    capabilities = torch.cpu.get_capabilities()
    bfloat16 = any(capabilities.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    name = str(capabilities.get("cpu_name") or platform.processor() or platform.machine())
    return Hardware("cpu", f"{name}, {torch.get_num_threads()} threads", bfloat16)


def faster_allocator() -> str | None:
    """Return the name of tcmalloc's library for ``LD_PRELOAD``; None: not Linux, not installed, or in use."""
    maps = Path("/proc/self/maps")
    if not maps.is_file() or "malloc" in maps.read_text(encoding="utf-8"):
        return None
    return find_library("tcmalloc") or find_library("tcmalloc_minimal")


def peak_memory_bytes(hardware: Hardware) -> int:
    """Return the peak memory in bytes: allocated on the GPU, or the process's resident set on the CPU."""
    if hardware.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS reports bytes, Linux KiB


def free_gpu_bytes() -> int:
    """Return the GPU memory available to this process, free or reserved by it, rounded down to full GiB."""
    import torch

    # Rounded, so that the same command resolves to the same micro-batch size when a little more is free.
    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved()) // GIB * GIB


def _gpu_spec(
    name: str,
    gib: float,
    rates: tuple[float, float, float],
    *,
    utilization: Utilization = OTHER_GPUS,
    bfloat16: bool = True,
) -> Device:
    flops_16bit, flops_float32, bandwidth = rates
    return Device(
        name,
        "cuda",
        int(gib * GIB),
        bfloat16,
        flops_16bit * 1e12,
        flops_float32 * 1e12,
        bandwidth * 1e9,
        utilization,
    )


# GiB: "total capacity" in PyTorch's messages on such cards (with ECC where it is on by default).
# Then TFLOP/s of dense 16-bit products (half of what data sheets give "with sparsity"; GeForce: summed in
# float32), TFLOP/s in float32, GB/s; from NVIDIA's data sheets and architecture papers.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu_spec("b200", 178.3, (2250, 75, 8000), utilization=HOPPER),
        _gpu_spec("h200", 139.8, (989, 67, 4800), utilization=HOPPER),
        _gpu_spec("h100", 79.2, (989, 67, 3350), utilization=HOPPER),
        _gpu_spec("h100-pcie", 79.2, (756, 51, 2000), utilization=HOPPER),
        _gpu_spec("a100-80g", 79.2, (312, 19.5, 2039), utilization=AMPERE),
        _gpu_spec("a100-40g", 39.4, (312, 19.5, 1555), utilization=AMPERE),
        _gpu_spec("l40s", 44.4, (362, 91.6, 864)),
        _gpu_spec("rtx6000ada", 47.5, (364, 91.1, 960)),
        _gpu_spec("a6000", 47.4, (155, 38.7, 768)),
        _gpu_spec("a40", 44.4, (150, 37.4, 696)),
        _gpu_spec("a10", 22.0, (125, 31.2, 600)),
        _gpu_spec("a10g", 22.0, (70, 31.5, 600)),
        _gpu_spec("l4", 22.0, (121, 30.3, 300)),
        _gpu_spec("t4", 14.6, (65, 8.1, 300), bfloat16=False),
        _gpu_spec("v100-32g", 31.7, (125, 15.7, 900), bfloat16=False),
        _gpu_spec("v100-16g", 15.8, (125, 15.7, 900), bfloat16=False),
        _gpu_spec("rtx5090", 31.4, (210, 105, 1792)),
        _gpu_spec("rtx4090", 23.6, (165, 82.6, 1008)),
        _gpu_spec("rtx4080", 15.6, (97.5, 48.7, 717)),
        _gpu_spec("rtx3090", 23.7, (71, 35.6, 936)),
        _gpu_spec("rtx3060", 11.8, (25.5, 12.7, 360)),
    )
}
ALIASES = {
    "a100": "a100-80g",
    "v100": "v100-16g",
    "4090": "rtx4090",
    "3090": "rtx3090",
    "5090": "rtx5090",
}
DRIVER_NAMES = {
    "h100pcie": "h100-pcie",
    "a100sxm440gb": "a100-40g",
    "a100pcie40gb": "a100-40g",
    "rtx6000ada": "rtx6000ada",
    "rtxa6000": "a6000",
    "v100sxm232gb": "v100-32g",
    "v100pcie32gb": "v100-32g",
}
"""The driver's names of cards that a prefix of the short name would confuse."""
SIZE_PATTERN = re.compile(r"(\d+(?:\.\d+)?)(?:g|gb|gib)")


def device_by_name(text: str) -> Device:
    """Return a device by name, or a GPU of a memory size such as ``24GB``.

    Raises:
        UserError: the name is unknown.
    """
    name = text.strip().lower().replace("_", "-").removeprefix("nvidia-")
    if name == "cpu":
        return cpu_device()
    if size := SIZE_PATTERN.fullmatch(name.replace(" ", "")):
        gib = float(size[1])
        return replace(
            _gpu_spec(f"a GPU of {gib:g} GB", gib * USABLE_FRACTION, (0, 0, 0)), utilization=OTHER_GPUS
        )
    names_by_letters = {_normalized(alias): alias for alias in (*GPUS, *ALIASES)}
    if match := names_by_letters.get(_normalized(name)):
        return GPUS[ALIASES.get(match, match)]
    names = ", ".join(GPUS)
    repair = did_you_mean(name, [*GPUS, *ALIASES]) or "any other card by its memory: --gpu 24GB"
    raise UserError(Problem("--gpu", f"'{text}' is unknown", f"{names}, cpu, or a size such as 24GB", repair))


def _normalized(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def detect_devices() -> tuple[Device, int]:
    """Return this machine's GPU as `nvidia-smi` reports it, or its CPU, and the number of devices."""
    gpus = _query_nvidia_smi()
    if not gpus:
        return cpu_device(), 1
    name, mebibytes = gpus[0]
    memory = int(mebibytes * 2**20 - DRIVER_GIB * GIB)
    return replace(_spec_of_driver_name(name), name=name, memory=memory), len(gpus)


def _spec_of_driver_name(name: str) -> Device:
    """Return the spec that matches the driver's name, or one of unknown speed."""
    letters = _normalized(name)
    exact = [short for driver_name, short in DRIVER_NAMES.items() if driver_name in letters]
    partial = [
        short for short in GPUS if _normalized(short.removesuffix("-80g").removesuffix("-16g")) in letters
    ]
    # The longest name wins: a10 is contained in a100.
    matches = exact or sorted(partial, key=len, reverse=True)
    return GPUS[matches[0]] if matches else _gpu_spec(name, 0, (0, 0, 0))


def _query_nvidia_smi() -> list[tuple[str, int]]:
    """Return name and MiB of every GPU that ``nvidia-smi`` lists; empty if it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.rsplit(",", 1) for line in result.stdout.splitlines() if result.returncode == 0]
    gpus = [(name.strip(), int(size)) for name, size in lines if size.strip().isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # nvidia-smi ignores it, CUDA does not
    return (
        gpus
        if visible is None
        else gpus[: len([index for index in visible.split(",") if index not in ("", "-1")])]
    )


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_device() -> Device:
    """Return the spec of this machine's CPU: the cores and memory that this process may use."""
    flags = _cpu_flags()
    cores = cpu_cores()
    flops_per_cycle = (
        32 if "avx512f" in flags else 16
    )  # products and sums of float32 in a cycle: two units of 16 or 8 lanes
    # 2: a fused multiply-add is two operations. 2.5 GHz, and 20 GB/s below, are assumed for any CPU.
    flops_float32 = cores * 2 * flops_per_cycle * 2.5e9
    bfloat16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    name = f"the CPU ({cores} core{'s' if cores > 1 else ''}, {platform.machine()})"
    return Device(
        name,
        "cpu",
        _machine_memory(),
        bfloat16,
        (1 + bfloat16) * flops_float32,
        flops_float32,
        20e9,
        CPU,
        free=free_memory(),
    )


def _cpu_flags() -> set[str]:
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(line[1].split()) if line else set()


def free_memory() -> int | None:
    """Return the bytes that a new program can use now: caches count as free; None if that is not known.

    In a container, no more than its limit (cgroup 2) leaves.
    """
    file = Path("/proc/meminfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if (line := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)) is None:
        return None
    available = 1024 * int(line[1])
    folder = Path("/sys/fs/cgroup")
    if not all((folder / name).is_file() for name in ("memory.max", "memory.current", "memory.stat")):
        return available
    limit, current, stat = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("memory.max", "memory.current", "memory.stat")
    )
    if not limit.strip().isdigit():
        return available
    # Pages of files are given back when memory is short.
    reclaimable = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)
    used = int(current) - (int(reclaimable[1]) if reclaimable else 0)
    return max(0, min(available, int(limit) - used))


def _machine_memory() -> int:
    """Return the machine's memory in bytes, or the container's (cgroup) limit if that is lower."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else ""
    return min(memory, int(text)) if text.isdigit() else memory
