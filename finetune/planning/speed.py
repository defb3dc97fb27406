r"""How long a run takes: arithmetic over what the device reaches, or what an earlier run has reached.

A token costs 2 P operations in a forward pass, with P the weights of all matrix products (embeddings are
looked up, at no cost), and attention to T tokens 4 L d T / 2 more (L layers, d the width of all queries; half
of the products lie above the diagonal). Backward, the gradient of activations costs as much again, that of a
weight 2 for each trained one alone, and gradient checkpointing one forward pass more:

    trained token = (2 + c) (2 P + 2 L d T) + 2 P_trained,   c = 1 with checkpointing, else 0

(Kaplan et al. 2020, arXiv 2001.08361, section 2.1: 6 P for full tuning; 4 P for an adapter.)
"""

from dataclasses import dataclass

from finetune.planning.architecture import Architecture
from finetune.planning.devices import Device
from finetune.planning.workload import Workload

DEQUANTIZED = (1.2, 1.6)
"""A pass over quantized weights takes this many times as long: litgpt, tutorials/resource-tables.md and
finetune_lora.md: 3.68 / 2.36 minutes (short rows), 1,090 / 876 seconds; torchtune's README: 3,083 / 2,413."""
DRAWN = (1.2, 5.0)
"""Drawing a token takes this many times as long as reading all weights once from memory: the library launches
kernels one by one (litgpt's table: 7B in bfloat16 on an A100, 31 tokens a second where memory allows 115)."""
LAUNCHED = (0.001, 0.0045)
"""Seconds in which a GPU's kernels of one layer are launched, forward and backward, however few the tokens:
litgpt's table has 0.142 s for a pass of about 110 tokens through 32 layers with LoRA."""
EXCHANGED = (1.0, 1.5)
"""Several processes wait for each other: not measured here, a guess to the safe side."""

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long, at best and at worst, and where this comes from."""

    least: float
    most: float
    how: str


def matrix_weights(architecture: Architecture) -> int:
    """Return the weights that a token is multiplied with: all linear layers of the decoder, and the head."""
    layers = sum(
        layer.weights for layer in architecture.linear_layers() if layer.count == architecture.layers
    )
    return layers + architecture.vocabulary * architecture.hidden


def read_operations(workload: Workload) -> float:
    """Return the operations of a token's forward pass, among half of the longest row."""
    architecture = workload.architecture
    seen = workload.columns / max(1, workload.completions / max(1, workload.lines))
    attention = 2 * architecture.layers * architecture.queries * seen
    return 2 * matrix_weights(architecture) + attention


def learnt_operations(workload: Workload, trained: int) -> float:
    """Return the operations of a token's forward and backward pass.

    Args:
        workload: what is computed.
        trained: parameters with a gradient.
    """
    passes = 2 + workload.checkpointing
    return passes * read_operations(workload) + 2 * min(trained, matrix_weights(workload.architecture))


def step_seconds(workload: Workload, device: Device, *, operations: float) -> Range | None:
    """Return the seconds of so many operations on all devices, at best and at worst; None: not known."""
    peak = device.peak(workload.precision)
    if not peak:
        return None
    slowest, fastest = device.used
    stored = DEQUANTIZED if workload.quantization != "none" else (1.0, 1.0)
    waits = EXCHANGED if workload.processes > 1 else (1.0, 1.0)
    ideal = operations / peak / workload.processes
    return ideal / fastest * stored[0] * waits[0], ideal / slowest * stored[1] * waits[1]


def launch_seconds(workload: Workload, *, passes: int) -> Range:
    """Return the seconds in which a GPU is told what to do, in so many forward and backward passes."""
    if workload.device == "cpu":
        return 0.0, 0.0
    quick, slow = LAUNCHED
    layers = passes * workload.architecture.layers
    return layers * quick, layers * slow


def drawn_seconds(workload: Workload, device: Device, *, replies: int, base_bytes: int) -> Range | None:
    """Return the seconds in which replies are drawn, token by token, several at once.

    Args:
        workload: what is computed; its rollout says how many are drawn at once, and how long they are.
        device: where.
        replies: in all.
        base_bytes: of the weights, which every token reads.
    """
    asked = workload.rollout
    if asked is None or not device.bandwidth or not device.peak(workload.precision):
        return None
    turns = replies / workload.processes / asked.lines * asked.completion
    reading = base_bytes / device.bandwidth
    computing = asked.lines * read_operations(workload) / device.peak(workload.precision)
    quick, slow = DRAWN
    return turns * max(reading, computing) * quick, turns * (reading + computing / device.used[0]) * slow
