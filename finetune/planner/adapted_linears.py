"""Linear layers with their adapters (LoRA and its kin, (IA)^3, OFT, bottlenecks) as simulated operations.

Calling convention: a method borrows its input tensors, and the caller owns the output.
"""

from dataclasses import dataclass, field
from functools import cached_property

from finetune.planner.architecture import LinearShape
from finetune.planner.low_rank import LowRankUpdate
from finetune.planner.parameter_count import FEEDFORWARD_MODULES, KV_MODULES, oft_block_size
from finetune.planner.static_memory import NF4_BLOCK
from finetune.planner.tape import Tape, Tensor
from finetune.planner.workload import LORA_METHODS, Adapter, Workload


@dataclass
class AdaptedLinears:
    """A model's linear layers on a tape.

    Attributes:
        tape: where operations are recorded.
        workload: sizes.
        autocast_cache: copies of trained weights in the compute dtype, cached by autocast until it exits.
    """

    tape: Tape
    workload: Workload
    autocast_cache: list[Tensor] = field(default_factory=list)

    @cached_property
    def layers_by_name(self) -> dict[str, LinearShape]:
        return {layer.name: layer for layer in self.workload.architecture.linear_layers()}

    @cached_property
    def embeddings(self) -> Tensor:
        """Return the trained input embeddings, which are the output head's weight too if tied."""
        model = self.workload.architecture
        return self.tape.parameter(model.vocab_size * model.hidden_size)

    @cached_property
    def token_rows(self) -> Tensor:
        """Return the rows of the embeddings that trainable_tokens trains."""
        return self.tape.parameter(self.adapter.tokens * self.workload.architecture.hidden_size)

    def token_table(self) -> Tensor:
        """Return a copy of the embeddings with the trained rows, which PEFT makes in every pass."""
        model = self.workload.architecture
        return self.tape.apply([self.token_rows], model.vocab_size * model.hidden_size, self.itemsize)

    @property
    def output_head(self) -> Tensor:
        """Return the trained output head in the compute dtype."""
        model = self.workload.architecture
        return self.autocast_copy(
            self.embeddings
            if model.tied_embeddings
            else self.tape.parameter(model.vocab_size * model.hidden_size)
        )

    @property
    def adapter(self) -> Adapter:
        return self.workload.adapter

    @property
    def itemsize(self) -> int:
        """Return the bytes per element of a linear layer's output."""
        return self.workload.itemsize

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        """Return a sum; its gradient is passed to both terms unchanged."""
        return self.tape.apply([left, right], left.numel, max(left.itemsize, right.itemsize), aliased=True)

    def to(self, states: Tensor, itemsize: int) -> Tensor:
        """Return a tensor with this itemsize: itself, or a copy."""
        if states.itemsize == itemsize:
            self.tape.retain(states)
            return states
        return self.tape.apply([states], states.numel, itemsize)

    def clear_autocast_cache(self) -> None:
        """Release autocast's cached weight copies, as autocast does on exit."""
        self.tape.release(*self.autocast_cache)
        self.autocast_cache = []

    def linear(self, states: Tensor, name: str) -> Tensor:
        """Return a linear layer's output including the adapter's."""
        layer = self.layers_by_name[name]
        method = self.adapter.method
        if method == "full":
            return self.trained_linear(states, layer)
        # (IA)^3 rescales the input of the feed-forward output layer, and the outputs of keys and values.
        if method == "ia3" and name in FEEDFORWARD_MODULES:
            return self.ia3_input(states, layer)
        if method == "oft" and self.is_target(name):
            return self.oft(states, layer)
        output = self.frozen_linear(states, layer)
        if method == "ia3" and name in KV_MODULES:
            return self.ia3_output(output, layer.out_features)
        if method == "bitfit" and layer.bias:
            return self.replace_output(output, self.add_bias(output, layer.out_features))
        if not self.is_target(name):
            return output
        if method not in (*LORA_METHODS, "vera"):
            return output
        return LowRankUpdate(self, layer).apply(states, output)

    def is_target(self, name: str) -> bool:
        """Return whether the adapter is attached to layers of this name."""
        return not self.adapter.targets or name in self.adapter.targets

    def replace_output(self, old: Tensor, new: Tensor) -> Tensor:
        """Release a tensor and return its replacement, cast to the same itemsize."""
        cast_output = self.to(new, old.itemsize)
        self.tape.release(old, new)
        return cast_output

    def trained_linear(self, states: Tensor, layer: LinearShape) -> Tensor:
        """Return W x of a trained weight: x is saved for the gradient of W, and W for that of x."""
        tape = self.tape
        inputs, weight = (
            self.to(states, self.itemsize),
            self.compute_weight(layer.in_features * layer.out_features),
        )
        rows = states.numel // layer.in_features
        output = tape.apply(
            [inputs, weight], rows * layer.out_features, self.itemsize, saved_for_backward=[inputs, weight]
        )
        tape.release(inputs)
        return output

    def frozen_linear(self, states: Tensor, layer: LinearShape) -> Tensor:
        """Return W x of a frozen weight: x is not saved; a quantized weight is dequantized in both passes.

        bitsandbytes saves x for 8-bit weights all the same, and computes in int8 with int32 accumulation.
        """
        tape, inputs = self.tape, self.to(states, self.itemsize)
        # The gradient of x needs W alone, and a frozen W is dequantized again in backward instead of saved.
        dequantized, rows = self.dequantized_bytes(layer), states.numel // layer.in_features
        is_int8 = self.workload.quantization == "int8"
        # 4 bytes per output: bitsandbytes sums int8 products in int32.
        workspace_bytes = 4 * rows * layer.out_features + 3 * inputs.numel if is_int8 else dequantized
        if self.workload.quantization == "nf4" and self.workload.quantized_itemsize > self.itemsize:
            # A stored base that multiplies in float32: copies of x and of the output in float32.
            workspace_bytes += self.workload.quantized_itemsize * (inputs.numel + rows * layer.out_features)
        workspace = tape.allocate(workspace_bytes, 1, "workspace")
        saved = [inputs] if is_int8 else []
        output = tape.apply(
            [inputs],
            rows * layer.out_features,
            self.itemsize,
            saved_for_backward=saved,
            workspace=dequantized,
        )
        tape.release(inputs, workspace)
        return output

    def dequantized_bytes(self, layer: LinearShape) -> int:
        """Return the bytes of a dequantized weight, with NF4's scales in float32 if they are quantized."""
        numel, workload = layer.in_features * layer.out_features, self.workload
        if workload.quantization == "none":
            return 0
        scales = (
            4 * numel // NF4_BLOCK if workload.quantization == "nf4" and workload.double_quantization else 0
        )
        # A weight that multiplies in float32 is dequantized to its stored dtype first, and then cast.
        cast = workload.quantized_itemsize if workload.quantized_itemsize > self.itemsize else 0
        return numel * (self.itemsize + cast) + scales

    def compute_weight(self, numel: int) -> Tensor:
        """Return a trained weight in the compute dtype."""
        return self.autocast_copy(self.tape.parameter(numel))

    def autocast_copy(self, weight: Tensor) -> Tensor:
        """Return a weight in the compute dtype; autocast caches the copy until it exits."""
        if self.itemsize == 4:  # autocast is off
            return weight
        copy = self.tape.apply([weight], weight.numel, self.itemsize)
        self.autocast_cache.append(copy)
        return copy

    def ia3_output(self, base: Tensor, width: int) -> Tensor:
        """Return (IA)^3's l * (W x) and release W x, which is saved for the gradient of l."""
        return self.replace_output(base, self.scale_by_vector(base, width))

    def ia3_input(self, states: Tensor, layer: LinearShape) -> Tensor:
        """Return (IA)^3's W (l * x): x is saved in float32."""
        states_fp32 = self.to(states, 4)
        scaled = self.scale_by_vector(states_fp32, layer.in_features)
        inner = self.to(scaled, states.itemsize)
        self.tape.release(states_fp32, scaled)
        output = self.frozen_linear(inner, layer)
        self.tape.release(inner)
        return output

    def scale_by_vector(self, states: Tensor, width: int) -> Tensor:
        """Return x times a trained float32 vector."""
        factor = self.tape.parameter(width)
        return self.tape.apply(
            [states, factor], states.numel, 4, saved_for_backward=[states], workspace=4 * states.numel
        )

    def add_bias(self, states: Tensor, width: int) -> Tensor:
        """Return x plus a trained float32 vector."""
        return self.tape.apply([states, self.tape.parameter(width)], states.numel, 4)

    def oft(self, states: Tensor, layer: LinearShape) -> Tensor:
        """Return OFT's W (R x), R a block-diagonal rotation in float32 or autocast's dtype; x is saved."""
        tape = self.tape
        size = oft_block_size(layer.in_features, self.adapter.block_size)
        # in / size blocks of size * (size - 1) / 2 skew-symmetric entries; the exact Cayley transform works
        # on full (size, size) matrices.
        rotation, cayley = (
            self.tape.parameter(layer.in_features * (size - 1) // 2),
            tape.allocate(3 * layer.in_features * size, 4),
        )
        states_fp32 = self.to(states, 4)
        inputs = self.to(states_fp32, self.itemsize)
        rotated = tape.apply(
            [inputs, rotation], states.numel, self.itemsize, saved_for_backward=[inputs, cayley]
        )
        # The rotated blocks are made contiguous again.
        contiguous = tape.apply([rotated], states.numel, self.itemsize)
        tape.release(inputs, rotated, cayley)
        rotated_fp32 = self.to(contiguous, 4)
        inner = self.to(rotated_fp32, states.itemsize)
        tape.release(contiguous)
        output = self.frozen_linear(inner, layer)
        tape.release(states_fp32, rotated_fp32, inner)
        return output

    def bottleneck(self, states: Tensor) -> Tensor:
        """Return a bottleneck adapter's output s W_up f(W_down x) in the compute dtype."""
        tape, hidden, bottleneck_width = self.tape, self.workload.architecture.hidden_size, self.adapter.width
        rows = states.numel // hidden
        states_fp32 = self.to(states, 4)
        inputs, down = self.to(states_fp32, self.itemsize), self.compute_weight(hidden * bottleneck_width)
        inner = tape.apply(
            [inputs, down], rows * bottleneck_width, self.itemsize, saved_for_backward=[inputs, down]
        )
        active = tape.apply([inner], inner.numel, self.itemsize, saves_output=True)
        tape.release(inputs, inner)
        up = self.compute_weight(hidden * bottleneck_width)
        outer = tape.apply([active, up], states.numel, self.itemsize, saved_for_backward=[active, up])
        tape.release(active)
        output = tape.apply([outer], outer.numel, self.itemsize)  # times the scale
        tape.release(outer, states_fp32)
        return output
