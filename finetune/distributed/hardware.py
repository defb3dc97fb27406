"""Detect this process's GPU or CPU, its bfloat16 support and peak memory; torch is imported late."""

import platform
import resource
from dataclasses import dataclass


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


def peak_memory_bytes(hardware: Hardware) -> int:
    """Return the peak memory in bytes: allocated on the GPU, or the process's resident set on the CPU."""
    if hardware.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS reports bytes, Linux KiB
