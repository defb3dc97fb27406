"""What is planned: a model, what is trained of it, what one forward pass holds. Numbers and words only."""

from dataclasses import dataclass
from typing import Literal

from finetune.planning.architecture import Architecture

Precision = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "int8"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "adafactor"]
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
Offload = Literal["none", "cpu", "nvme"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]
Objective = Literal["likelihood", "comparison", "scores", "ppo", "none"]
"""What stands on the last state: the likelihood of tokens (sft, pretrain, rejection), log-probabilities of
completions (dpo, kto and the other preference losses), scores (reward), both policy and value (ppo)."""

BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""

PARTED_WEIGHTS = ("zero3", "fsdp2")
PARTED_GRADIENTS = ("zero2", *PARTED_WEIGHTS)
PARTED_STATES = ("zero1", *PARTED_GRADIENTS)
"""Strategies that cut these into one part a process."""

LOW_RANK = ("lora", "qlora", "rslora", "lora_plus", "pissa", "loftq", "dora", "adalora")
PREFIX = ("prefix", "ptuning_v2", "adaptive_prefix")
PROMPT = ("prompt", "ptuning", "progressive_prompt", "multitask_prompt")
BOTTLENECK = ("bottleneck", "adamix")


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is trained: a file of finetune/adapters/, and those of its settings that change its size.

    Attributes:
        method: the file's name.
        rank: of low-rank products (of adalora the rank at the start), of vera, of multitask_prompt.
        targets: last names of the linear layers that get one; empty: all of them.
        dropout: whether inputs are dropped in training.
        virtual_tokens: vectors in front of a sequence; of llama_adapter the length of each layer's prompt.
        frozen_tokens: of them, those of earlier tasks.
        width: of a bottleneck, or of the network that makes a prompt.
        experts: bottlenecks in adamix's mixture.
        placement: of a bottleneck: houlsby, pfeiffer, parallel.
        encoder: of ptuning: mlp or lstm.
        projection: whether an MLP makes the prefix.
        top_layers: of llama_adapter: layers that have a prompt.
        block_size: of oft.
        tokens: of trainable_tokens: their number.
        passes: forward passes of each batch (adamix with consistency: 2).
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
    passes: int = 1

    @property
    def whole_model(self) -> bool:
        """Return whether the base's own weights are trained."""
        return self.method == "full"

    @property
    def written(self) -> int:
        """Return the tokens that are put before a row's embeddings and go through all layers."""
        return self.virtual_tokens if self.method in PROMPT else 0

    @property
    def cached(self) -> int:
        """Return the keys and values that are put before a row's own in every layer."""
        return self.virtual_tokens if self.method in PREFIX else 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """How PPO's policy answers.

    Attributes:
        lines: prompts that are answered at once.
        prompt: tokens of the longest of them.
        completion: tokens of a reply at most.
    """

    lines: int
    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Workload:
    """One optimizer step of one process.

    Attributes:
        architecture: the base.
        adapter: what is trained.
        objective: what stands on the last state.
        precision: of the forward pass, and of frozen weights that are not quantized.
        quantization: how the frozen base is stored.
        optimizer: which.
        lines: of a forward pass: rows, or groups with the prompt shared, or completions.
        columns: tokens of the longest line, prompt and all completions that stand in it.
        predicted: states of a forward pass that the head is computed for (those before a label).
        targets: tokens whose log-probability is taken; 0: as many as ``predicted``.
        completions: of a forward pass, in comparisons.
        masked: whether lines are padded or hold block masks; plain causal attention needs no mask.
        accumulated: forward passes of an optimizer step.
        checkpointing: whether activations are computed again in the backward pass.
        attention: its implementation; ``eager`` writes all scores out.
        live_reference: whether a reference is computed in each step.
        heads: scores of a reward or value model.
        scorers: reward models on the same base, in ppo.
        rollout: how PPO's policy answers.
        device: ``cuda`` or ``cpu``.
        processes: that share the work.
        strategy: what they partition.
        offload: where partitioned states lie.
    """

    architecture: Architecture
    adapter: Adapter = Adapter()
    objective: Objective = "likelihood"
    precision: Precision = "bfloat16"
    quantization: Quantization = "none"
    optimizer: Optimizer = "adamw"
    lines: int = 1
    columns: int = 512
    predicted: int = 512
    targets: int = 0
    completions: int = 0
    masked: bool = False
    accumulated: int = 1
    checkpointing: bool = False
    attention: Attention = "sdpa"
    live_reference: bool = False
    heads: int = 0
    scorers: int = 0
    rollout: Rollout | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    processes: int = 1
    strategy: Strategy = "single"
    offload: Offload = "none"

    @property
    def bytes(self) -> int:
        """Return the bytes of a number that the forward pass computes."""
        return BYTES[self.precision]

    @property
    def width(self) -> int:
        """Return the tokens of a line with the vectors that the adapter puts before it."""
        return self.columns + self.adapter.written

    @property
    def tokens(self) -> int:
        """Return the states of a forward pass."""
        return self.lines * self.width
