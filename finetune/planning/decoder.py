"""A decoder layer written down operation by operation, as transformers and PEFT compute it.

A method leaves the tensors that it is given to its caller, as a Python function does, and hands over what it
returns. T is the number of states of a forward pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune.planning.adapted import Linears
from finetune.planning.architecture import Architecture
from finetune.planning.attention import Attention
from finetune.planning.tape import Operation, Tape, Tensor
from finetune.planning.workload import BOTTLENECK, Adapter, Workload

PLAYED = 3
"""Layers that are written down: the first, which may have nothing to learn before it, another, the last."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer leaves behind.

    Attributes:
        kept: bytes by part.
        trained: bytes of the gradients of its weights.
        casts: bytes of autocast's copies among what is kept.
    """

    kept: Mapping[str, int]
    trained: int
    casts: int


@dataclass
class Decoder:
    """One model's layers on a tape.

    Attributes:
        linears: its linear layers.
    """

    linears: Linears

    @property
    def tape(self) -> Tape:
        """Return where operations are written."""
        return self.linears.tape

    @property
    def workload(self) -> Workload:
        """Return the sizes."""
        return self.linears.workload

    @property
    def model(self) -> Architecture:
        """Return the sizes of the model."""
        return self.workload.architecture

    @property
    def adapter(self) -> Adapter:
        """Return what is trained."""
        return self.workload.adapter

    @property
    def each(self) -> int:
        """Return the bytes of a number that a linear layer gives."""
        return self.workload.bytes

    @property
    def stream(self) -> int:
        """Return the bytes of a number of a layer's input: those of the weights as they are stored."""
        return 4 if self.adapter.whole_model else self.each

    @property
    def scores(self) -> Attention:
        """Return the product of queries, keys and values."""
        return Attention(self.linears)

    def layers(self, states: Tensor) -> Tensor:
        """Return the states behind all layers and the last norm; the caller holds ``states`` no more.

        The layers in the middle are all alike. What is held at a place of one of them grows evenly from layer
        to layer, so that the first and the last hold the most; between them the others are taken at once.
        """
        tape, count = self.tape, self.model.layers
        if self.adapter.method == "llama_adapter":  # the layers below learn nothing and keep nothing
            count = min(count, self.adapter.top_layers)
        for index in range(min(count, PLAYED)):
            before, trained, casts = dict(tape.live), tape.trained, len(self.linears.casts)
            made = self.checkpointed(states) if self.workload.checkpointing else self.layer(states)
            tape.drop(states)
            states = made
            if index == PLAYED - 2 and count > PLAYED:
                kept = {part: size - before.get(part, 0) for part, size in tape.live.items()}
                own = sum(cast.size for cast in self.linears.casts[casts:])
                like = Layer(kept, tape.trained - trained, own)
                states = self.skipped(states, like, count - PLAYED)
        last = self.norm(states, self.model.hidden)
        tape.drop(states)
        return last

    def skipped(self, states: Tensor, like: Layer, count: int) -> Tensor:
        """Return the states behind ``count`` more layers like the last one, in the place of those before."""
        tape, made = self.tape, self.tape.new(states.numbers, states.each)
        kept = dict(like.kept)
        tape.trained += count * like.trained
        if self.workload.checkpointing or not tape.recording:  # nothing but autocast keeps its copies
            kept["activations"] = kept.get("activations", 0) - like.casts
            self.linears.casts.append(tape.new(count * like.casts, 1))
        blocks = [tape.new(count * size, 1, part) for part, size in kept.items()]

        def back(grad: Tensor) -> None:
            tape.drop(*blocks)
            if not tape.accumulating:
                tape.new(count * like.trained, 1, "gradients")
            tape.accumulate(states, grad)

        if tape.recording and states.learns:
            tape.write(Operation(made, [states], [], again=back))
        tape.drop(states)
        return made

    def checkpointed(self, states: Tensor) -> Tensor:
        """Return a layer's output; only its input is kept, and the rest is computed again when it is needed.

        Chen et al. 2016 (arXiv 1604.06174), section 4; PyTorch's form without reentry.
        """
        tape, recording = self.tape, self.tape.recording
        tape.recording = False
        made = self.layer(states)
        tape.recording = recording
        if recording:
            tape.hold(states)
            tape.write(Operation(made, [states], [states], again=self._again(states)))
        return made

    def _again(self, states: Tensor) -> Callable[[Tensor], None]:
        def run(grad: Tensor) -> None:
            tape, outer = self.tape, self.linears
            outside, tape.operations = tape.operations, []
            self.linears = Linears(tape, outer.workload)
            made = self.layer(states)
            self.linears.forget_casts()
            tape.drop(made)
            made.grad = grad
            tape.unwind()
            tape.operations, self.linears = outside, outer

        return run

    def layer(self, states: Tensor) -> Tensor:
        """Return a layer's output."""
        model, tape = self.model, self.tape
        before = self.norm(states, model.hidden)
        attended = self.attention(before)
        tape.drop(before)
        if model.sandwich:
            attended = self.behind(attended)
        middle = states if model.parallel else self.linears.add(states, attended)
        before = self.norm(middle, model.hidden)
        wide = self.feed_forward(before)
        if self.adapter.method == "bottleneck" and self.adapter.placement == "parallel":
            wide = self.with_bottleneck(wide, before)
        tape.drop(before)
        if model.sandwich:
            wide = self.behind(wide)
        if model.parallel:
            both = self.linears.add(wide, attended)
            made = self.linears.add(both, states)
            tape.drop(both)
        else:
            made = self.linears.add(middle, wide)
            tape.drop(middle)
        tape.drop(attended, wide)
        return made

    def behind(self, states: Tensor) -> Tensor:
        """Return the norm of a block's output, in its place."""
        made = self.norm(states, self.model.hidden)
        self.tape.drop(states)
        return made

    def norm(self, states: Tensor, width: int) -> Tensor:
        """Return a norm's output.

        RMSNorm: x as float32 and 1/rms are kept for x / rms; with trained gains x / rms too. LayerNorm: x is
        kept, under autocast as float32, and what comes out is float32.
        """
        tape, rows = self.tape, states.numbers // width
        trained = self.adapter.whole_model or self.adapter.method == "layernorm"
        gains = [tape.weight(width)] if trained else []
        if self.model.layer_norm:
            return self.layer_norm(states, gains)
        wide = self.linears.to(states, 4)
        tape.moment(wide.size, "activations")  # x squared
        scale = tape.run([wide], rows, 4, keeps=[wide], keeps_result=True, workspace=3 * wide.size)
        scaled = tape.run([wide, scale], wide.numbers, 4, keeps=[wide, scale])
        tape.drop(wide, scale)
        narrow = self.linears.to(scaled, states.each)
        tape.drop(scaled)
        made = tape.run([narrow, *gains], narrow.numbers, states.each, keeps=[narrow] if trained else [])
        tape.drop(narrow)
        return made

    def layer_norm(self, states: Tensor, gains: list[Tensor]) -> Tensor:
        """Return LayerNorm's output: x is kept; on a GPU autocast computes it in float32."""
        tape, work = self.tape, self.workload
        inputs = self.linears.to(states, 4 if work.device == "cuda" else states.each)
        made = tape.run([inputs, *gains], inputs.numbers, inputs.each, keeps=[inputs])
        tape.drop(inputs)
        if self.adapter.method == "bitfit":
            shifted = self.linears.shifted(made, self.model.hidden)
            return self.linears.in_place_of(made, shifted)
        return made

    def attention(self, states: Tensor) -> Tensor:
        """Return what attention adds."""
        tape = self.tape
        mixed = self.of_fused(states) if self.model.fused else self.of_three(states)
        made = self.linears.linear(mixed, "dense" if self.model.fused else "o_proj")
        tape.drop(mixed)
        if self.adapter.method == "llama_adapter":
            return self.with_prompt(made, states)
        return self.with_bottleneck(made, made) if self.adapter.placement == "houlsby" else made

    def with_prompt(self, made: Tensor, states: Tensor) -> Tensor:
        """Return attention's output and what LLaMA-Adapter adds: attention to a prompt.

        Queries are computed once more; the softmax over the prompt is float32, and its gate keeps it.
        """
        tape, adapter = self.tape, self.adapter
        query = self.turned(self.linears.linear(states, "q_proj"))
        mixed = self.scores.to_prompt(query, adapter.virtual_tokens)
        added = self.linears.linear(mixed, "o_proj")
        both = self.linears.add(made, added)
        tape.drop(query, mixed, made, added)
        return both

    def of_three(self, states: Tensor) -> Tensor:
        """Return mixed values, of queries, keys and values from layers of their own."""
        query, key, value = (self.linears.linear(states, f"{name}_proj") for name in "qkv")
        query, key = self.turned(query), self.turned(key)
        made = self.scores.mixed(query, key, value, whole=value)
        self.tape.drop(query, key, value)
        return made

    def of_fused(self, states: Tensor) -> Tensor:
        """Return mixed values, of views of one layer's output; they lie head by head, and are copied once."""
        tape, model, tokens = self.tape, self.model, self.workload.tokens
        fused = self.linears.linear(states, "query_key_value")
        views = tape.split(fused, [tokens * size for size in (model.queries, model.keys, model.keys)])
        query, key = self.rotated(views[0], model.queries), self.rotated(views[1], model.keys)
        mixed = self.scores.mixed(query, key, views[2], whole=fused)
        tape.drop(query, key, *views, fused)
        made = tape.run([mixed], mixed.numbers, mixed.each)
        tape.drop(mixed)
        return made

    def turned(self, states: Tensor) -> Tensor:
        """Return queries or keys with their norm and their rotation, in their place."""
        if self.model.query_key_norm:
            normed = self.norm(states, self.model.head_dim)
            self.tape.drop(states)
            states = normed
        made = self.rotated(states, states.numbers // self.workload.tokens)
        self.tape.drop(states)
        return made

    def rotated(self, states: Tensor, width: int) -> Tensor:
        """Return x cos + rotate(x) sin: two products, of which autograd keeps the cosines and sines alone."""
        tape, numbers = self.tape, self.workload.tokens * width
        each = max(states.each, self.stream)
        straight = tape.run([states], numbers, each)
        tape.moment(numbers * states.each // 2, "activations")  # minus one half
        crossed = tape.run([states], numbers, states.each, workspace=2 * numbers * states.each)
        swung = tape.run([crossed], numbers, each)
        tape.drop(crossed)
        made = self.linears.add(straight, swung)
        tape.drop(straight, swung)
        return made

    def feed_forward(self, states: Tensor) -> Tensor:
        """Return what the feed-forward block adds."""
        tape = self.tape
        inner = self.linears.linear(states, "gate_proj" if self.model.gated else "dense_h_to_4h")
        active = tape.run([inner], inner.numbers, inner.each, keeps=[inner])
        tape.drop(inner)
        if self.model.gated:
            up = self.linears.linear(states, "up_proj")
            product = tape.run([active, up], active.numbers, active.each, keeps=[active, up])
            tape.drop(active, up)
            active = product
        made = self.linears.linear(active, "down_proj" if self.model.gated else "dense_4h_to_h")
        tape.drop(active)
        parallel = self.adapter.method == "bottleneck" and self.adapter.placement == "parallel"
        behind = self.adapter.method in BOTTLENECK and not parallel
        return self.with_bottleneck(made, made) if behind else made

    def with_bottleneck(self, made: Tensor, states: Tensor) -> Tensor:
        """Return a block's output and what a bottleneck makes of some states, in its place."""
        added = self.linears.bottleneck(states)
        both = self.linears.add(made, added)
        self.tape.drop(made, added)
        return both
