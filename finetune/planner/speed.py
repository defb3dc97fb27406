"""Training time from FLOPs: forward, backward and generation, over the throughput that a device reaches.

A token costs 2 P FLOPs in a forward pass, with P the weights of all matmuls (embedding look-ups are free),
and attention to T tokens 4 L d T / 2 more (L layers, d the width of all query heads; the causal mask halves
the products). Backward, the gradient of activations costs as much again, and that of the trained weights 2
per weight; gradient checkpointing adds one forward pass:

    FLOPs per trained token = (2 + c) (2 P + 2 L d T) + 2 P_trained,   c = 1 with checkpointing, else 0

(Kaplan et al. 2020, arXiv 2001.08361, section 2.1: 6 P for full fine-tuning; 4 P for an adapter.)
"""

from dataclasses import dataclass

from finetune.distributed.hardware import Device
from finetune.planner.architecture import Architecture
from finetune.planner.workload import Workload

DEQUANTIZATION_SLOWDOWN = (1.2, 1.6)
"""Slow-down of a pass over quantized weights: litgpt, tutorials/resource-tables.md and
finetune_lora.md: 3.68 / 2.36 minutes (short rows), 1,090 / 876 seconds; torchtune's README: 3,083 / 2,413.
"""
DECODING_SLOWDOWN = (1.2, 5.0)
"""Slow-down of decoding relative to reading all weights once per token from memory: kernels are launched one
by one (litgpt's table: 7B in bfloat16 on an A100, 31 tokens/s where the bandwidth allows 115).
"""
LAUNCH_SECONDS_PER_LAYER = (0.001, 0.0045)
"""Seconds to launch a GPU's kernels of one layer, forward and backward, independent of the token count:
litgpt's table has 0.142 s for a pass of about 110 tokens through 32 layers with LoRA.
"""
COMMUNICATION_SLOWDOWN = (1.0, 1.5)
"""Slow-down by communication between processes: not measured here, a conservative guess."""

SecondsRange = tuple[float, float]


@dataclass(frozen=True, slots=True)
class TimeEstimate:
    """A time estimate: lower and upper bound in seconds, and how it was derived."""

    lower: float
    upper: float
    basis: str


def matmul_weights(architecture: Architecture) -> int:
    """Return the weights in a token's matmuls: all linear layers of the decoder, and the head."""
    layers = sum(
        layer.weights for layer in architecture.linear_layers() if layer.count == architecture.num_layers
    )
    return layers + architecture.vocab_size * architecture.hidden_size


def forward_flops(workload: Workload) -> float:
    """Return the FLOPs of a token's forward pass, at the middle of the longest row."""
    architecture = workload.architecture
    # With causal attention a token sees half of its row on average; completions that share a prompt do not
    # see each other.
    attended = workload.seq_len / max(1, workload.completions / max(1, workload.rows))
    attention = 2 * architecture.num_layers * architecture.query_width * attended
    return 2 * matmul_weights(architecture) + attention


def training_flops(workload: Workload, trainable: int) -> float:
    """Return the FLOPs of a token's forward and backward pass.

    Args:
        workload: the step.
        trainable: parameters with a gradient.
    """
    # Forward, the gradient of activations, and the recomputed forward under checkpointing.
    forward_units = 2 + workload.checkpointing
    return forward_units * forward_flops(workload) + 2 * min(trainable, matmul_weights(workload.architecture))


def compute_seconds(workload: Workload, device: Device, *, flops: float) -> SecondsRange | None:
    """Return lower and upper bound of the seconds for some FLOPs on all devices; None: unknown device."""
    peak = device.peak_flops(workload.precision)
    if not peak:
        return None
    slowest, fastest = device.utilization
    dequantization = DEQUANTIZATION_SLOWDOWN if workload.quantization != "none" else (1.0, 1.0)
    communication = COMMUNICATION_SLOWDOWN if workload.processes > 1 else (1.0, 1.0)
    # Lower bound first: the highest utilization and the smallest overheads.
    ideal = flops / peak / workload.processes
    return ideal / fastest * dequantization[0] * communication[0], ideal / slowest * dequantization[
        1
    ] * communication[1]


def launch_seconds(workload: Workload, *, micro_batches: int) -> SecondsRange:
    """Return lower and upper bound of the seconds to launch the kernels of some micro-batches on a GPU."""
    if workload.device == "cpu":
        return 0.0, 0.0
    quick, slow = LAUNCH_SECONDS_PER_LAYER
    layers = micro_batches * workload.architecture.num_layers
    return layers * quick, layers * slow


def generation_seconds(
    workload: Workload, device: Device, *, completions: int, base_bytes: int
) -> SecondsRange | None:
    """Return lower and upper bound of the seconds of generation: batched decoding, token by token.

    Args:
        workload: the step; its rollout has the generation batch and the lengths.
        device: the device.
        completions: in all.
        base_bytes: bytes of the weights, which every decoding step reads.
    """
    generation = workload.rollout
    if generation is None or not device.bandwidth or not device.peak_flops(workload.precision):
        return None
    decoding_steps = completions / workload.processes / generation.rows * generation.completion
    read_seconds = base_bytes / device.bandwidth
    matmul_seconds = generation.rows * forward_flops(workload) / device.peak_flops(workload.precision)
    quick, slow = DECODING_SLOWDOWN
    # At best reading and computing overlap, at worst they add up.
    return decoding_steps * max(read_seconds, matmul_seconds) * quick, decoding_steps * (
        read_seconds + matmul_seconds / device.utilization[0]
    ) * slow
