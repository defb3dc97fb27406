"""Low-rank updates of a linear layer as simulated operations: LoRA and its variants, DoRA, VeRA.

Calling convention: a method borrows its input tensors, and the caller owns the output.
"""

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from finetune.planner.architecture import LinearShape
from finetune.planner.tape import Tape, Tensor

if TYPE_CHECKING:
    from finetune.planner.adapted_linears import AdaptedLinears

MASK_ITEMSIZE = 1
"""Bytes per element of a dropout mask before it is packed into bits."""


@dataclass(frozen=True)
class LowRankUpdate:
    """The update of one layer.

    Attributes:
        linears: the layer's model.
        layer: its shape.
    """

    linears: "AdaptedLinears"
    layer: LinearShape

    @property
    def tape(self) -> Tape:
        return self.linears.tape

    @property
    def itemsize(self) -> int:
        """Return the bytes per element of a linear layer's output."""
        return self.linears.itemsize

    def apply(self, states: Tensor, base: Tensor) -> Tensor:
        """Return W x with the update, and release W x."""
        method = self.linears.adapter.method
        update = {"dora": self.dora, "vera": self.vera}.get(method, self.lora)
        return update(states, base)

    def lora(self, states: Tensor, base: Tensor) -> Tensor:
        """Return W x + s B A x (LoRA) and release W x.

        x is not cast to A's float32 (``finetune/adapters/_lora_input.py``). Without dropout, and on a CPU in
        any case, x itself is saved, once for all layers that read it.
        """
        if (
            self.drops_inputs
            and self.linears.workload.device == "cpu"
            and self.linears.adapter.method != "adalora"
        ):
            outer = self.raise_rank(self.dropout_linear(states))
        else:
            dropped_states = self.apply_dropout(states)
            outer = self.low_rank_product(dropped_states)
            self.tape.release(dropped_states)
        scaled = self.tape.apply([outer], outer.numel, self.itemsize)  # times alpha / r
        self.tape.release(outer)
        output = self.linears.add(base, scaled)
        self.tape.release(base, scaled)
        return output

    def low_rank_product(self, states: Tensor) -> Tensor:
        """Return B A x; A and B each save their input."""
        tape, rank, rows = self.tape, self.linears.adapter.rank, states.numel // self.layer.in_features
        inputs, down = (
            self.linears.to(states, self.itemsize),
            self.linears.compute_weight(rank * self.layer.in_features),
        )
        inner = tape.apply([inputs, down], rows * rank, self.itemsize, saved_for_backward=[inputs, down])
        tape.release(inputs)
        return self.raise_rank(inner)

    def raise_rank(self, inner: Tensor) -> Tensor:
        """Return B times A's output, which is consumed and saved."""
        rows = inner.numel // self.linears.adapter.rank
        up = self.linears.compute_weight(self.linears.adapter.rank * self.layer.out_features)
        outer = self.tape.apply(
            [inner, up], rows * self.layer.out_features, self.itemsize, saved_for_backward=[inner, up]
        )
        self.tape.release(inner)
        return outer

    def dropout_linear(self, states: Tensor) -> Tensor:
        """Return A times x after dropout, on a CPU: x and one bit per element of the mask are saved."""
        tape, rank, rows = self.tape, self.linears.adapter.rank, states.numel // self.layer.in_features
        inputs = self.linears.to(states, self.itemsize)
        down = self.cast_weight(rank * self.layer.in_features)
        temporaries = inputs.numel * (MASK_ITEMSIZE + self.itemsize)  # the mask, x where it is kept
        bits = tape.allocate(ceil(inputs.numel / 8), 1)
        tape.allocate_temporary(temporaries, "activations")
        unscaled = tape.allocate(rows * rank, self.itemsize)
        inner = tape.apply(
            [inputs, down],
            rows * rank,
            self.itemsize,
            saved_for_backward=[inputs, down, bits],
            workspace=temporaries,
        )
        tape.release(inputs, bits, unscaled, *([] if down.is_parameter else [down]))
        return inner

    def cast_weight(self, numel: int) -> Tensor:
        """Return a trained weight, or a copy of it in the compute dtype that autocast does not cache."""
        weight = self.tape.parameter(numel)
        return weight if self.itemsize == 4 else self.tape.apply([weight], numel, self.itemsize)

    @property
    def drops_inputs(self) -> bool:
        """Return whether dropout is on; PPO switches it off."""
        return self.linears.adapter.dropout and self.linears.workload.objective != "ppo"

    def apply_dropout(self, states: Tensor) -> Tensor:
        """Return the tensor after dropout: a GPU saves one byte per element, a CPU one bit."""
        tape = self.tape
        if not self.drops_inputs:
            tape.retain(states)
            return states
        is_cpu = self.linears.workload.device == "cpu"
        mask = tape.allocate(ceil(states.numel / 8) if is_cpu else states.numel, 1)
        temporaries = states.numel * (MASK_ITEMSIZE + states.itemsize) if is_cpu else 0
        tape.allocate_temporary(temporaries, "activations")
        output = tape.apply(
            [states], states.numel, states.itemsize, saved_for_backward=[mask], workspace=temporaries
        )
        tape.release(mask)
        return output

    def dora(self, states: Tensor, base: Tensor) -> Tensor:
        """Return W x + (m - 1) W x + m s B A x (DoRA) and release W x; m is the magnitude over the norm.

        For the norm PEFT multiplies B A out, in float32. With dropout it computes W x once more, from the
        dropped-out x, and then autocast's copy of W is saved for the gradient of x.
        """
        tape, rows = self.tape, states.numel // self.layer.in_features
        numel = self.layer.in_features * self.layer.out_features
        states_fp32 = self.linears.to(states, 4)
        dropped_states = self.apply_dropout(states_fp32)
        product = self.dora_product()
        # W in float32 for the norm; a plain float32 weight is read where it is.
        weight = tape.allocate(
            0 if self.itemsize == 4 and not self.linears.dequantized_bytes(self.layer) else numel, 4
        )
        # W + s B A and a temporary for its column norms.
        tape.allocate_temporary(2 * 4 * numel)
        outer = self.low_rank_product(dropped_states)
        if self.linears.adapter.dropout:
            inputs, weight_copy = (
                self.linears.to(dropped_states, self.itemsize),
                tape.allocate(0 if self.itemsize == 4 else numel, self.itemsize),
            )
            base_output = tape.apply([inputs], base.numel, self.itemsize, saved_for_backward=[weight_copy])
            tape.release(inputs, weight_copy)
        elif self.layer.bias:
            base_output = tape.apply([base], base.numel, base.itemsize, aliased=True)  # W x without the bias
        else:
            tape.retain(base)
            base_output = base
        magnitude = tape.parameter(self.layer.out_features)
        scaled_base = tape.apply(
            [base_output, magnitude],
            rows * self.layer.out_features,
            4,
            saved_for_backward=[base_output],
            workspace=4 * base.numel,
        )
        scaled_delta = tape.apply(
            [outer, magnitude], outer.numel, 4, saved_for_backward=[outer], workspace=4 * base.numel
        )
        delta = tape.apply([scaled_delta], scaled_delta.numel, 4)
        tape.release(scaled_delta)
        update = self.linears.add(scaled_base, delta)
        tape.release(scaled_base, delta, base_output, outer, weight, *product, dropped_states, states_fp32)
        output = self.linears.add(base, update)
        tape.release(update)
        return self.linears.replace_output(base, output)

    def dora_product(self) -> list[Tensor]:
        """Return B A in float32, and the identity matrix that PEFT computes it from.

        The identity is A's input, so the graph of B A saves it, in the compute dtype, as long as B A exists.
        """
        tape, numel = self.tape, self.layer.in_features * self.layer.out_features
        identity = tape.allocate(self.layer.in_features**2, self.itemsize)
        if self.itemsize == 4:
            return [identity, tape.allocate(numel, 4)]
        identity_fp32 = tape.allocate(self.layer.in_features**2, 4)
        product = tape.allocate(numel, self.itemsize)
        tape.release(identity_fp32)
        product_fp32 = tape.allocate(numel, 4)
        tape.release(product)
        return [identity, product_fp32]

    def vera(self, states: Tensor, base: Tensor) -> Tensor:
        """Return W x + b * (B (d * (A x))) (VeRA) and release W x.

        A and B are frozen; the gradients of d and b need A x and B (...). Autocast's copies of A and B are
        saved.
        """
        tape, rank, rows = self.tape, self.linears.adapter.rank, states.numel // self.layer.in_features
        copied_rank = 0 if self.itemsize == 4 else rank  # float32 matrices need no copy
        dropped_states = self.apply_dropout(states)
        inputs, down = (
            self.linears.to(dropped_states, self.itemsize),
            tape.allocate(copied_rank * self.layer.in_features, self.itemsize),
        )
        inner = tape.apply([inputs], rows * rank, self.itemsize, saved_for_backward=[down])
        tape.release(dropped_states, inputs, down)
        scaled_inner = tape.apply([inner, tape.parameter(rank)], rows * rank, 4, saved_for_backward=[inner])
        narrow, up = (
            self.linears.to(scaled_inner, self.itemsize),
            tape.allocate(copied_rank * self.layer.out_features, self.itemsize),
        )
        outer = tape.apply([narrow], base.numel, self.itemsize, saved_for_backward=[up])
        tape.release(inner, scaled_inner, narrow, up)
        scaled = tape.apply(
            [outer, tape.parameter(self.layer.out_features)], outer.numel, 4, saved_for_backward=[outer]
        )
        output = self.linears.add(base, scaled)
        tape.release(outer, scaled)
        return self.linears.replace_output(base, output)
