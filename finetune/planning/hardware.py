"""What this machine computes with."""

import platform
import resource
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hardware:
    """The device that a process uses.

    Attributes:
        device: ``cpu`` or ``cuda``.
        name: what the maker calls it.
        bfloat16: whether it computes in bfloat16 rather than imitating it.
        count: how many of them this machine has; the CPU is one.
    """

    device: str
    name: str
    bfloat16: bool
    count: int = 1


def detect() -> Hardware:
    """Return the first GPU, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return Hardware(
            "cuda",
            torch.cuda.get_device_name(0),
            torch.cuda.is_bf16_supported(including_emulation=False),
            torch.cuda.device_count(),
        )
    flags = torch.cpu.get_capabilities()
    bfloat16 = any(flags.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    name = str(flags.get("cpu_name") or platform.processor() or platform.machine())
    return Hardware("cpu", f"{name}, {torch.get_num_threads()} threads", bfloat16)


def peak_memory_bytes(hardware: Hardware) -> int:
    """Return the most memory held so far: allocated on the GPU, or resident in the process on the CPU."""
    if hardware.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
