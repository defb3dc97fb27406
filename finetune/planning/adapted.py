"""Linear layers with their adapters (LoRA, DoRA, VeRA, (IA)^3, OFT, bottlenecks) as simulated operations.

Calling convention: a method borrows its input buffers, and the caller owns the output.
"""

from dataclasses import dataclass, field
from functools import cached_property

from finetune.planning.architecture import Linear
from finetune.planning.resident import NF4_BLOCK
from finetune.planning.tape import Tape, Tensor
from finetune.planning.trained import INNER, KEYS_AND_VALUES, block_size
from finetune.planning.workload import LOW_RANK, Adapter, Workload


@dataclass
class Linears:
    """A model's linear layers on a tape.

    Attributes:
        tape: where operations are recorded.
        workload: sizes.
        autocast_cache: copies of trained weights in the compute dtype, cached by autocast until it exits.
    """

    tape: Tape
    workload: Workload
    casts: list[Tensor] = field(default_factory=list)

    @cached_property
    def named(self) -> dict[str, Linear]:
        return {layer.name: layer for layer in self.workload.architecture.linear_layers()}

    @cached_property
    def table(self) -> Tensor:
        """Return the trained input embeddings, which are the output head's weight too if tied."""
        model = self.workload.architecture
        return self.tape.weight(model.vocabulary * model.hidden)

    @property
    def head(self) -> Tensor:
        """Return the trained output head in the compute dtype."""
        model = self.workload.architecture
        return self.copied(self.table if model.tied else self.tape.weight(model.vocabulary * model.hidden))

    @property
    def adapter(self) -> Adapter:
        return self.workload.adapter

    @property
    def each(self) -> int:
        """Return the bytes per element of a linear layer's output."""
        return self.workload.bytes

    def add(self, one: Tensor, other: Tensor) -> Tensor:
        """Return a sum; its gradient is passed to both terms unchanged."""
        return self.tape.run([one, other], one.numbers, max(one.each, other.each), aliased=True)

    def to(self, states: Tensor, each: int) -> Tensor:
        """Return a buffer with this itemsize: itself, or a copy."""
        if states.each == each:
            self.tape.hold(states)
            return states
        return self.tape.run([states], states.numbers, each)

    def forget_casts(self) -> None:
        """Release autocast's cached weight copies, as autocast does on exit."""
        self.tape.drop(*self.casts)
        self.casts = []

    def linear(self, states: Tensor, name: str) -> Tensor:
        """Return a linear layer's output including the adapter's."""
        layer = self.named[name]
        method = self.adapter.method
        if method == "full":
            return self.trained_linear(states, layer)
        # (IA)^3 rescales the input of the feed-forward output layer, and the outputs of keys and values.
        if method == "ia3" and name in INNER:
            return self.scaled_input(states, layer)
        if method == "oft" and self.is_target(name):
            return self.rotated_input(states, layer)
        made = self.frozen_linear(states, layer)
        if method == "ia3" and name in KEYS_AND_VALUES:
            return self.scaled_output(made, layer.outputs)
        if method == "bitfit" and layer.bias:
            return self.in_place_of(made, self.shifted(made, layer.outputs))
        if not self.is_target(name):
            return made
        if method in ("dora", "vera"):
            return (self.dora if method == "dora" else self.vera)(states, layer, made)
        return self.low_rank(states, layer, made) if method in LOW_RANK else made

    def is_target(self, name: str) -> bool:
        """Return whether the adapter is attached to layers of this name."""
        return not self.adapter.targets or name in self.adapter.targets

    def in_place_of(self, before: Tensor, made: Tensor) -> Tensor:
        """Release a buffer and return its replacement, cast to the same itemsize."""
        narrow = self.to(made, before.each)
        self.tape.drop(before, made)
        return narrow

    def trained_linear(self, states: Tensor, layer: Linear) -> Tensor:
        """Return W x of a trained weight: x is saved for the gradient of W, and W for that of x."""
        tape = self.tape
        inputs, weight = self.to(states, self.each), self.cast(layer.inputs * layer.outputs)
        rows = states.numbers // layer.inputs
        made = tape.run([inputs, weight], rows * layer.outputs, self.each, keeps=[inputs, weight])
        tape.drop(inputs)
        return made

    def frozen_linear(self, states: Tensor, layer: Linear) -> Tensor:
        """Return W x of a frozen weight: x is not saved; a quantized weight is dequantized in both passes.

        bitsandbytes saves x for 8-bit weights all the same, and computes in int8 with int32 accumulation.
        """
        tape, inputs = self.tape, self.to(states, self.each)
        # The gradient of x needs W alone, and a frozen W is dequantized again in backward instead of saved.
        taken, rows = self.dequantized(layer), states.numbers // layer.inputs
        is_int8 = self.workload.quantization == "int8"
        sums = 4 * rows * layer.outputs + 3 * inputs.numbers if is_int8 else taken
        for_a_moment = tape.new(sums, 1, "workspace")
        keeps = [inputs] if is_int8 else []
        made = tape.run([inputs], rows * layer.outputs, self.each, keeps=keeps, workspace=taken)
        tape.drop(inputs, for_a_moment)
        return made

    def dequantized(self, layer: Linear) -> int:
        """Return the bytes of a dequantized weight, with NF4's scales in float32."""
        numbers, stored = layer.inputs * layer.outputs, self.workload.quantization
        scales = 4 * numbers // NF4_BLOCK if stored == "nf4" else 0
        return 0 if stored == "none" else numbers * self.each + scales

    def cast(self, numbers: int) -> Tensor:
        """Return a trained weight in the compute dtype."""
        return self.copied(self.tape.weight(numbers))

    def copied(self, weight: Tensor) -> Tensor:
        """Return a weight in the compute dtype; autocast caches the copy until it exits."""
        if self.each == 4:  # autocast is off
            return weight
        copy = self.tape.run([weight], weight.numbers, self.each)
        self.casts.append(copy)
        return copy

    def low_rank(self, states: Tensor, layer: Linear, base: Tensor) -> Tensor:
        """Return W x + s B A x (LoRA) and release W x.

        PEFT casts x to A's float32, applies dropout (a mask and a new x), and autocast casts it back: A's
        input and A's output are saved in the compute dtype. Without autocast and dropout x itself is saved,
        once for all layers that read it.
        """
        wide = self.to(states, 4)  # PEFT casts x to the dtype of A
        dropped = self.dropped(wide)
        outer = self.product(dropped, layer)
        self.tape.drop(dropped)
        scaled = self.tape.run([outer], outer.numbers, self.each)  # times alpha / r
        self.tape.drop(outer)
        made = self.add(base, scaled)
        self.tape.drop(base, scaled, wide)
        return made

    def product(self, states: Tensor, layer: Linear) -> Tensor:
        """Return B A x; A and B each save their input."""
        tape, rank, rows = self.tape, self.adapter.rank, states.numbers // layer.inputs
        inputs, down = self.to(states, self.each), self.cast(rank * layer.inputs)
        inner = tape.run([inputs, down], rows * rank, self.each, keeps=[inputs, down])
        tape.drop(inputs)
        up = self.cast(rank * layer.outputs)
        outer = tape.run([inner, up], rows * layer.outputs, self.each, keeps=[inner, up])
        tape.drop(inner)
        return outer

    def dropped(self, states: Tensor) -> Tensor:
        """Return the buffer after dropout: a GPU saves one byte per element, a CPU the full-size noise."""
        tape = self.tape
        if not self.adapter.dropout or self.workload.objective == "ppo":  # PPO switches dropout off
            tape.hold(states)
            return states
        noise = tape.new(states.numbers, 1 if self.workload.device == "cuda" else states.each)
        made = tape.run([states], states.numbers, states.each, keeps=[noise])
        tape.drop(noise)
        return made

    def dora(self, states: Tensor, layer: Linear, base: Tensor) -> Tensor:
        """Return W x + (m - 1) W x + m s B A x (DoRA) and release W x; m is the magnitude over the norm.

        For the norm PEFT multiplies B A out, in float32. With dropout it computes W x once more, from the
        dropped-out x, and then autocast's copy of W is saved for the gradient of x.
        """
        tape, rows = self.tape, states.numbers // layer.inputs
        numbers = layer.inputs * layer.outputs
        wide = self.to(states, 4)
        dropped = self.dropped(wide)
        product = tape.new(numbers, 4)  # B A
        # PEFT computes B A from an identity matrix as x; under autocast 16-bit copies are made too.
        tape.moment(4 * layer.inputs**2 + (self.each % 4) * (layer.inputs**2 + numbers))
        # W in float32 for the norm; a plain float32 weight is read where it is.
        weight = tape.new(0 if self.each == 4 and not self.dequantized(layer) else numbers, 4)
        # W + s B A and a temporary for its column norms.
        tape.moment(2 * 4 * numbers)
        outer = self.product(dropped, layer)
        if self.adapter.dropout:
            inputs, copy = self.to(dropped, self.each), tape.new(0 if self.each == 4 else numbers, self.each)
            again = tape.run([inputs], base.numbers, self.each, keeps=[copy])
            tape.drop(inputs, copy)
        else:
            tape.hold(base)
            again = base
        magnitude = tape.weight(layer.outputs)
        own = tape.run([again, magnitude], rows * layer.outputs, 4, keeps=[again], workspace=4 * base.numbers)
        added = tape.run([outer, magnitude], outer.numbers, 4, keeps=[outer], workspace=4 * base.numbers)
        scaled = tape.run([added], added.numbers, 4)
        tape.drop(added)
        both = self.add(own, scaled)
        tape.drop(own, scaled, again, outer, weight, product, dropped, wide)
        made = self.add(base, both)
        tape.drop(both)
        return self.in_place_of(base, made)

    def vera(self, states: Tensor, layer: Linear, base: Tensor) -> Tensor:
        """Return W x + b * (B (d * (A x))) (VeRA) and release W x.

        A and B are frozen; the gradients of d and b need A x and B (...). Autocast's copies of A and B are
        saved.
        """
        tape, rank, rows = self.tape, self.adapter.rank, states.numbers // layer.inputs
        copied = 0 if self.each == 4 else rank  # float32 matrices need no copy
        wide = self.to(states, 4)
        dropped = self.dropped(wide)
        inputs, down = self.to(dropped, self.each), tape.new(copied * layer.inputs, self.each)
        inner = tape.run([inputs], rows * rank, self.each, keeps=[down])
        tape.drop(dropped, inputs, down)
        turned = tape.run([inner, tape.weight(rank)], rows * rank, 4, keeps=[inner])
        narrow, up = self.to(turned, self.each), tape.new(copied * layer.outputs, self.each)
        outer = tape.run([narrow], base.numbers, self.each, keeps=[up])
        tape.drop(inner, turned, narrow, up)
        scaled = tape.run([outer, tape.weight(layer.outputs)], outer.numbers, 4, keeps=[outer])
        made = self.add(base, scaled)
        tape.drop(outer, scaled, wide)
        return self.in_place_of(base, made)

    def scaled_output(self, base: Tensor, width: int) -> Tensor:
        """Return (IA)^3's l * (W x) and release W x, which is saved for the gradient of l."""
        return self.in_place_of(base, self.scaled(base, width))

    def scaled_input(self, states: Tensor, layer: Linear) -> Tensor:
        """Return (IA)^3's W (l * x): x is saved in float32."""
        wide = self.to(states, 4)
        scaled = self.scaled(wide, layer.inputs)
        inner = self.to(scaled, states.each)
        self.tape.drop(wide, scaled)
        made = self.frozen_linear(inner, layer)
        self.tape.drop(inner)
        return made

    def scaled(self, states: Tensor, width: int) -> Tensor:
        """Return x times a trained float32 vector."""
        factor = self.tape.weight(width)
        return self.tape.run(
            [states, factor], states.numbers, 4, keeps=[states], workspace=4 * states.numbers
        )

    def shifted(self, states: Tensor, width: int) -> Tensor:
        """Return x plus a trained float32 vector."""
        return self.tape.run([states, self.tape.weight(width)], states.numbers, 4)

    def rotated_input(self, states: Tensor, layer: Linear) -> Tensor:
        """Return OFT's W (R x), R a block-diagonal rotation in float32 or autocast's dtype; x is saved."""
        tape = self.tape
        size = block_size(layer.inputs, self.adapter.block_size)
        rotation, solved = (
            self.tape.weight(layer.inputs * (size - 1) // 2),
            tape.new(3 * layer.inputs * size, 4),
        )
        wide = self.to(states, 4)
        inputs = self.to(wide, self.each)
        turned = tape.run([inputs, rotation], states.numbers, self.each, keeps=[inputs, solved])
        # The rotated blocks are made contiguous again.
        laid = tape.run([turned], states.numbers, self.each)
        tape.drop(inputs, turned, solved)
        again = self.to(laid, 4)
        inner = self.to(again, states.each)
        tape.drop(laid)
        made = self.frozen_linear(inner, layer)
        tape.drop(wide, again, inner)
        return made

    def bottleneck(self, states: Tensor) -> Tensor:
        """Return a bottleneck adapter's output s W_up f(W_down x) in the compute dtype."""
        tape, hidden, width = self.tape, self.workload.architecture.hidden, self.adapter.width
        rows = states.numbers // hidden
        wide = self.to(states, 4)
        inputs, down = self.to(wide, self.each), self.cast(hidden * width)
        inner = tape.run([inputs, down], rows * width, self.each, keeps=[inputs, down])
        active = tape.run([inner], inner.numbers, self.each, keeps_result=True)
        tape.drop(inputs, inner)
        up = self.cast(hidden * width)
        outer = tape.run([active, up], states.numbers, self.each, keeps=[active, up])
        tape.drop(active)
        made = tape.run([outer], outer.numbers, self.each)  # times the scale
        tape.drop(outer, wide)
        return made
