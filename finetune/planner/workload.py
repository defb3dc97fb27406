"""Planner inputs: architecture, adapter, the sizes of one optimizer step, and the work of a full run."""

from dataclasses import dataclass
from typing import Literal

from finetune.planner.architecture import Architecture
from finetune.recipe.base_config import StoredQuantization

Precision = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "int8"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "adafactor"]
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
Offload = Literal["none", "cpu", "nvme"]
AttentionImplementation = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]
ObjectiveKind = Literal["likelihood", "comparison", "scores", "ppo", "none"]
"""The loss: cross-entropy of tokens (sft, pretrain, rejection), log-probabilities of
completions (dpo, kto and the other preference losses), scores (reward), both policy and value (ppo).
"""

ITEMSIZES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per element."""


LORA_METHODS = ("lora", "qlora", "rslora", "lora_plus", "pissa", "loftq", "dora", "adalora")
PREFIX_METHODS = ("prefix", "ptuning_v2", "adaptive_prefix")
PROMPT_METHODS = ("prompt", "ptuning", "progressive_prompt", "multitask_prompt")
BOTTLENECK_METHODS = ("bottleneck", "adamix")


@dataclass(frozen=True, slots=True)
class Adapter:
    """The trained adapter: a file of finetune/adapters/, and those of its settings that change its size.

    Attributes:
        method: the file's name.
        rank: of low-rank products (for adalora the initial rank), of vera, of multitask_prompt.
        targets: module names of the linear layers it is attached to; empty: all of them.
        dropout: whether dropout is applied to its inputs in training.
        virtual_tokens: vectors prepended to a sequence; for llama_adapter the length of each layer's prompt.
        frozen_tokens: those of them that belong to earlier tasks.
        width: of a bottleneck, or of the network that encodes a prompt.
        experts: bottlenecks in adamix's mixture.
        placement: of a bottleneck: houlsby, pfeiffer, parallel.
        encoder: of ptuning: mlp or lstm.
        projection: whether an MLP projects the prefix.
        top_layers: llama_adapter's layers that have a prompt.
        block_size: of oft.
        tokens: the number of trainable_tokens.
        forward_passes: per batch (adamix with consistency: 2).
    """

    method: str = "lora"
    rank: int = 16
    targets: tuple[str, ...] = ()
    dropout: bool = True
    virtual_tokens: int = 0
    frozen_tokens: int = 0
    width: int = 0
    experts: int = 1
    placement: str = "parallel"
    encoder: str = "mlp"
    projection: bool = False
    top_layers: int = 0
    block_size: int = 32
    tokens: int = 0
    forward_passes: int = 1

    @property
    def full_finetuning(self) -> bool:
        """Return whether the base's own weights are trained."""
        return self.method == "full"

    @property
    def prepended_tokens(self) -> int:
        """Return the virtual tokens prepended to the embeddings, which run through all layers."""
        return self.virtual_tokens if self.method in PROMPT_METHODS else 0

    @property
    def prefix_tokens(self) -> int:
        """Return the virtual keys and values prepended in every layer."""
        return self.virtual_tokens if self.method in PREFIX_METHODS else 0


@dataclass(frozen=True, slots=True)
class GenerationBatch:
    """Sizes of the policy's generation.

    Attributes:
        rows: prompts per generation batch.
        prompt: tokens of the longest prompt.
        completion: maximum new tokens.
    """

    rows: int
    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Workload:
    """One optimizer step of one process.

    Attributes:
        architecture: the base.
        adapter: the trained adapter.
        objective: the loss.
        precision: of the forward pass, and of frozen weights that are not quantized.
        quantization: storage format of the frozen base.
        stored: how the base's own files store it; None: they are unquantized, and loading quantizes them.
        optimizer: its name.
        rows: rows of a micro-batch: examples, groups with a shared prompt, or completions.
        seq_len: tokens of the longest row, prompt and all its completions included.
        predicted: states per micro-batch that the output head is computed for (those before a label).
        targets: tokens whose log-probability is computed; 0: as many as ``predicted``.
        completions: per micro-batch, in comparisons.
        masked: whether attention needs a mask (padding, block masks); plain causal attention needs none.
        accumulation_steps: micro-batches per optimizer step.
        checkpointing: whether activations are recomputed in the backward pass.
        attention: its implementation; ``eager`` materializes all scores.
        live_reference: whether a reference model is run in each step.
        heads: outputs of a reward or value head.
        scorers: reward models on the same base, in ppo.
        rollout: sizes of the policy's generation.
        device: ``cuda`` or ``cpu``.
        processes: their number.
        strategy: how the processes shard the training state.
        offload: where sharded states are stored.
    """

    architecture: Architecture
    adapter: Adapter = Adapter()
    objective: ObjectiveKind = "likelihood"
    precision: Precision = "bfloat16"
    quantization: Quantization = "none"
    stored: StoredQuantization | None = None
    optimizer: Optimizer = "adamw"
    rows: int = 1
    seq_len: int = 512
    predicted: int = 512
    targets: int = 0
    completions: int = 0
    masked: bool = False
    accumulation_steps: int = 1
    checkpointing: bool = False
    attention: AttentionImplementation = "sdpa"
    live_reference: bool = False
    heads: int = 0
    scorers: int = 0
    rollout: GenerationBatch | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    processes: int = 1
    strategy: Strategy = "single"
    offload: Offload = "none"

    @property
    def itemsize(self) -> int:
        """Return the bytes per element in the forward pass."""
        return ITEMSIZES[self.precision]

    @property
    def double_quantization(self) -> bool:
        """Return whether 4-bit scales are quantized too, as loading with ``quantization: nf4`` does."""
        return self.stored is None or self.stored.double_quantization

    @property
    def quantized_itemsize(self) -> int:
        """Return the bytes per element in which a 4-bit layer multiplies: a stored base names its dtype."""
        return (
            self.itemsize if self.stored is None else max(self.itemsize, ITEMSIZES[self.stored.compute_dtype])
        )

    @property
    def positions(self) -> int:
        """Return the positions of a row, virtual tokens included."""
        return self.seq_len + self.adapter.prepended_tokens

    @property
    def tokens(self) -> int:
        """Return the positions of a micro-batch."""
        return self.rows * self.positions


@dataclass(frozen=True, slots=True)
class TotalWork:
    """Work of a full run, without the evaluations before and after it.

    Attributes:
        steps: optimizer steps.
        trained_tokens: tokens of forward and backward passes.
        forward_tokens: tokens of forward passes alone: reference, value, reward models.
        completions: sampled from the policy.
        completion_tokens: maximum tokens of one.
    """

    steps: int
    trained_tokens: float
    forward_tokens: float = 0.0
    completions: int = 0
    completion_tokens: int = 0
