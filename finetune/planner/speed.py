"""Training time from FLOPs: forward, backward and generation, over the throughput that a device reaches.

A token costs 2 P FLOPs in a forward pass, with P the weights of all matmuls (embedding look-ups are free),
and attention to T tokens 4 L d T / 2 more (L layers, d the width of all query heads; the causal mask halves
the products). Backward, the gradient of activations costs as much again, and that of the trained weights 2
per weight; gradient checkpointing adds one forward pass:

    FLOPs per trained token = (2 + c) (2 P + 2 L d T) + 2 P_trained,   c = 1 with checkpointing, else 0

(Kaplan et al. 2020, arXiv 2001.08361, section 2.1: 6 P for full fine-tuning; 4 P for an adapter.)
"""

from dataclasses import dataclass
from statistics import fmean

from finetune.distributed.hardware import Device
from finetune.planner.architecture import Architecture
from finetune.planner.workload import TotalWork, Workload

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
SHARDED_COMMUNICATION_SLOWDOWN = {"zero3": 1.25, "fsdp2": 1.25}
"""Slow-down: half of the extra communication of ZeRO-3 is assumed to overlap with computation."""
BUS_BYTES_PER_SECOND = 12e9
"""Bytes/s between GPU and host memory: PCIe 4.0 x16 as reached in practice."""
DEFAULT_FLOPS = 100e12
"""FLOP/s assumed for an unknown GPU, to weigh communication against computation."""
NOTABLE_LAUNCH_FRACTION = 0.3
"""Share of the time above which kernel launches are mentioned."""

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
    ideal = flops / peak / _num_devices(workload)
    return ideal / fastest * dequantization[0] * communication[0], ideal / slowest * dequantization[
        1
    ] * communication[1]


def _num_devices(workload: Workload) -> int:
    """Return the devices that share the work: a GPU per process, but one CPU for all processes."""
    return 1 if workload.device == "cpu" else workload.processes


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
    decoding_steps = completions / _num_devices(workload) / generation.rows * generation.completion
    read_seconds = base_bytes / device.bandwidth
    matmul_seconds = generation.rows * forward_flops(workload) / device.peak_flops(workload.precision)
    quick, slow = DECODING_SLOWDOWN
    # At best reading and computing overlap, at worst they add up.
    return decoding_steps * max(read_seconds, matmul_seconds) * quick, decoding_steps * (
        read_seconds + matmul_seconds / device.utilization[0]
    ) * slow


def estimate_time(
    workload: Workload, device: Device, work: TotalWork, *, trainable: int, base_bytes: int
) -> TimeEstimate | None:
    """Return the time of a full run, without loading and evaluation; None: unknown device.

    Args:
        workload: one optimizer step of a process.
        device: the device of each process.
        work: of the full run.
        trainable: number of trainable parameters.
        base_bytes: bytes of the base's weights.
    """
    flops = work.trained_tokens * training_flops(workload, trainable) + work.forward_tokens * forward_flops(
        workload
    )
    training = compute_seconds(workload, device, flops=flops)
    if training is None:
        return None
    micro_batches = work.steps * workload.accumulation_steps
    launching = launch_seconds(workload, micro_batches=micro_batches)
    # At best kernel launches overlap with computation, at worst they add up.
    lower, upper = max(training[0], launching[0]), training[1] + launching[1]
    slow, fast = device.utilization
    peak = f"{device.peak_flops(workload.precision) / 1e12:,.3g} TFLOP/s"
    basis = f"estimated: {slow:.0%} to {fast:.0%} of this device's peak of {peak}"
    if launching[1] > NOTABLE_LAUNCH_FRACTION * training[1]:
        basis += f", plus kernel launches of {micro_batches:,} small micro-batches"
    if work.completions:
        generation = generation_seconds(workload, device, completions=work.completions, base_bytes=base_bytes)
        if generation is None:
            return None
        lower, upper = lower + generation[0], upper + generation[1]
        basis += f", plus {work.completions:,} completions of up to {work.completion_tokens} tokens"
    return TimeEstimate(lower, upper, basis)


def seconds_per_token(
    workload: Workload, device: Device, work: TotalWork | None, *, trainable: int, base_bytes: int
) -> float:
    """Return the seconds per trained token, up to a factor that all settings of a recipe share."""
    peak = device.peak_flops(workload.precision) or DEFAULT_FLOPS
    dequantization = fmean(DEQUANTIZATION_SLOWDOWN) if workload.quantization != "none" else 1.0
    compute = training_flops(workload, trainable) / (fmean(device.utilization) * peak) * dequantization
    generation = None
    if work is not None and work.completions:
        generation = generation_seconds(workload, device, completions=work.completions, base_bytes=base_bytes)
    return (
        compute * SHARDED_COMMUNICATION_SLOWDOWN.get(workload.strategy, 1.0)
        + _offload_seconds_per_token(workload, trainable)
        + (0.0 if generation is None or work is None else fmean(generation) / work.trained_tokens)
    )


def _offload_seconds_per_token(workload: Workload, trainable: int) -> float:
    """Return the seconds per token to transfer offloaded state over the bus.

    Gradients go to the host and weights come back once per step; with ZeRO-3 each process also fetches its
    shard of the weights for the forward pass, and for the backward pass.
    """
    if workload.offload == "none":
        return 0.0
    tokens = workload.tokens * workload.accumulation_steps
    # float32 gradients out and float32 weights back.
    gradient_bytes = 8 * trainable / workload.processes
    # The weights, for the forward and the backward pass of every micro-batch.
    weight_bytes = (
        2
        * workload.accumulation_steps
        * workload.architecture.parameters
        * workload.itemsize
        / workload.processes
    )
    return (
        (gradient_bytes + (weight_bytes if workload.strategy == "zero3" else 0.0))
        / BUS_BYTES_PER_SECOND
        / tokens
    )
