"""Training time from FLOPs: forward, backward and generation, over the throughput that a device reaches.

A token costs 2 P FLOPs in a forward pass, with P the weights of all matmuls (embedding look-ups are free),
and attention to T tokens 4 L d T / 2 more (L layers, d the width of all query heads; the causal mask halves
the products). Backward, the gradient of activations costs as much again, and that of the trained weights 2
per weight; gradient checkpointing adds one forward pass:

    FLOPs per trained token = (2 + c) (2 P + 2 L d T) + 2 P_trained,   c = 1 with checkpointing, else 0

(Kaplan et al. 2020, arXiv 2001.08361, section 2.1: 6 P for full fine-tuning; 4 P for an adapter.)
"""

from dataclasses import dataclass

from finetune.planning.architecture import Architecture
from finetune.planning.devices import Device
from finetune.planning.workload import Workload

DEQUANTIZED = (1.2, 1.6)
"""Slow-down of a pass over quantized weights: litgpt, tutorials/resource-tables.md and
finetune_lora.md: 3.68 / 2.36 minutes (short rows), 1,090 / 876 seconds; torchtune's README: 3,083 / 2,413.
"""
DRAWN = (1.2, 5.0)
"""Slow-down of decoding relative to reading all weights once per token from memory: kernels are launched one
by one (litgpt's table: 7B in bfloat16 on an A100, 31 tokens/s where the bandwidth allows 115).
"""
LAUNCHED = (0.001, 0.0045)
"""Seconds to launch a GPU's kernels of one layer, forward and backward, independent of the token count:
litgpt's table has 0.142 s for a pass of about 110 tokens through 32 layers with LoRA.
"""
EXCHANGED = (1.0, 1.5)
"""Slow-down by communication between processes: not measured here, a conservative guess."""

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Seconds:
    """A time estimate: lower and upper bound in seconds, and how it was derived."""

    least: float
    most: float
    how: str


def matrix_weights(architecture: Architecture) -> int:
    """Return the weights in a token's matmuls: all linear layers of the decoder, and the head."""
    layers = sum(
        layer.weights for layer in architecture.linear_layers() if layer.count == architecture.layers
    )
    return layers + architecture.vocabulary * architecture.hidden


def read_operations(workload: Workload) -> float:
    """Return the FLOPs of a token's forward pass, at the middle of the longest row."""
    architecture = workload.architecture
    # With causal attention a token sees half of its row on average; completions that share a prompt do not
    # see each other.
    seen = workload.columns / max(1, workload.completions / max(1, workload.lines))
    attention = 2 * architecture.layers * architecture.queries * seen
    return 2 * matrix_weights(architecture) + attention


def learnt_operations(workload: Workload, trained: int) -> float:
    """Return the FLOPs of a token's forward and backward pass.

    Args:
        workload: the step.
        trainable: parameters with a gradient.
    """
    # Forward, the gradient of activations, and the recomputed forward under checkpointing.
    passes = 2 + workload.checkpointing
    return passes * read_operations(workload) + 2 * min(trained, matrix_weights(workload.architecture))


def step_seconds(workload: Workload, device: Device, *, operations: float) -> Range | None:
    """Return lower and upper bound of the seconds for some FLOPs on all devices; None: unknown device."""
    peak = device.peak(workload.precision)
    if not peak:
        return None
    slowest, fastest = device.used
    stored = DEQUANTIZED if workload.quantization != "none" else (1.0, 1.0)
    waits = EXCHANGED if workload.processes > 1 else (1.0, 1.0)
    # Lower bound first: the highest utilization and the smallest overheads.
    ideal = operations / peak / workload.processes
    return ideal / fastest * stored[0] * waits[0], ideal / slowest * stored[1] * waits[1]


def launch_seconds(workload: Workload, *, passes: int) -> Range:
    """Return lower and upper bound of the seconds to launch the kernels of some micro-batches on a GPU."""
    if workload.device == "cpu":
        return 0.0, 0.0
    quick, slow = LAUNCHED
    layers = passes * workload.architecture.layers
    return layers * quick, layers * slow


def drawn_seconds(workload: Workload, device: Device, *, replies: int, base_bytes: int) -> Range | None:
    """Return lower and upper bound of the seconds of generation: batched decoding, token by token.

    Args:
        workload: the step; its rollout has the generation batch and the lengths.
        device: the device.
        completions: in all.
        base_bytes: bytes of the weights, which every decoding step reads.
    """
    asked = workload.rollout
    if asked is None or not device.bandwidth or not device.peak(workload.precision):
        return None
    turns = replies / workload.processes / asked.lines * asked.completion
    reading = base_bytes / device.bandwidth
    computing = asked.lines * read_operations(workload) / device.peak(workload.precision)
    quick, slow = DRAWN
    # At best reading and computing overlap, at worst they add up.
    return turns * max(reading, computing) * quick, turns * (reading + computing / device.used[0]) * slow
