"""Decoder layers as simulated operations, in the order in which transformers and PEFT compute them.

Calling convention: a method borrows its input buffers, and the caller owns the output.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune.planning.adapted import Linears
from finetune.planning.architecture import Architecture
from finetune.planning.attention import Attention
from finetune.planning.tape import Operation, Tape, Tensor
from finetune.planning.workload import BOTTLENECK, Adapter, Workload

PLAYED = 3
"""Layers that are simulated: the first, which may have no gradient before it, a middle one, and the last."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer leaves in memory.

    Attributes:
        saved_bytes: bytes by category.
        grad_bytes: bytes of its weight gradients.
        autocast_bytes: bytes of autocast's weight copies among the saved ones.
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
        return self.linears.tape

    @property
    def workload(self) -> Workload:
        return self.linears.workload

    @property
    def model(self) -> Architecture:
        return self.workload.architecture

    @property
    def adapter(self) -> Adapter:
        return self.workload.adapter

    @property
    def each(self) -> int:
        """Return the bytes per element of a linear layer's output."""
        return self.workload.bytes

    @property
    def stream(self) -> int:
        """Return the bytes per element of the residual stream, which has the dtype of the stored weights."""
        return 4 if self.adapter.whole_model else self.each

    @property
    def scores(self) -> Attention:
        return Attention(self.linears)

    def layers(self, states: Tensor) -> Tensor:
        """Return the hidden states after all layers and the final norm; ``states`` is consumed.

        All middle layers are alike. Live memory at a given point of a layer changes linearly with the layer's
        index, so the peak is in the first or in the last layer; the layers between are added as one block.
        """
        tape, count = self.tape, self.model.layers
        if self.adapter.method == "llama_adapter":  # the layers below have no gradient and save nothing
            count = min(count, self.adapter.top_layers)
        for index in range(min(count, PLAYED)):
            before, trained, casts = dict(tape.live), tape.trained, len(self.linears.casts)
            made = self.checkpointed(states) if self.workload.checkpointing else self.layer(states)
            tape.drop(states)
            states = made
            # The middle layer's footprint is multiplied by the number of layers that are not simulated.
            if index == PLAYED - 2 and count > PLAYED:
                kept = {part: size - before.get(part, 0) for part, size in tape.live.items()}
                own = sum(cast.size for cast in self.linears.casts[casts:])
                like = Layer(kept, tape.trained - trained, own)
                states = self.skipped(states, like, count - PLAYED)
        last = self.norm(states, self.model.hidden)
        tape.drop(states)
        return last

    def skipped(self, states: Tensor, like: Layer, count: int) -> Tensor:
        """Return the hidden states after ``count`` more layers like the last one; ``states`` is consumed."""
        tape, made = self.tape, self.tape.new(states.numbers, states.each)
        kept = dict(like.kept)
        tape.trained += count * like.trained
        if self.workload.checkpointing or not tape.recording:
            # Only autocast's cache holds the weight copies then; no operation saved them.
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
        """Return a layer's output under gradient checkpointing: its input is saved, the rest recomputed.

        Chen et al. 2016 (arXiv 1604.06174), section 4; PyTorch's non-reentrant form.
        """
        tape, recording = self.tape, self.tape.recording
        # The first forward pass runs under no_grad: nothing inside the layer is saved.
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
            # Like torch.utils.checkpoint: the recomputed layer has its own graph and autocast cache.
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
        model, tape = self.model, self.tape
        before = self.norm(states, model.hidden)
        attended = self.attention(before)
        tape.drop(before)
        if model.sandwich:
            attended = self.behind(attended)
        # GPT-NeoX: attention and feed-forward block read the same input, and both outputs are added at the
        # end.
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
        """Return the post-norm of a block's output, which is consumed."""
        made = self.norm(states, self.model.hidden)
        self.tape.drop(states)
        return made

    def norm(self, states: Tensor, width: int) -> Tensor:
        """Return a norm's output.

        RMSNorm saves x in float32 and 1/rms for x / rms; with trained gains also x / rms. LayerNorm saves x,
        under autocast in float32, and its output is float32.
        """
        tape, rows = self.tape, states.numbers // width
        trained = self.adapter.whole_model or self.adapter.method == "layernorm"
        gains = [tape.weight(width)] if trained else []
        if self.model.layer_norm:
            return self.layer_norm(states, gains)
        wide = self.linears.to(states, 4)
        tape.moment(wide.size, "activations")  # x ** 2
        scale = tape.run([wide], rows, 4, keeps=[wide], keeps_result=True, workspace=3 * wide.size)
        scaled = tape.run([wide, scale], wide.numbers, 4, keeps=[wide, scale])
        tape.drop(wide, scale)
        narrow = self.linears.to(scaled, states.each)
        tape.drop(scaled)
        made = tape.run([narrow, *gains], narrow.numbers, states.each, keeps=[narrow] if trained else [])
        tape.drop(narrow)
        return made

    def layer_norm(self, states: Tensor, gains: list[Tensor]) -> Tensor:
        """Return LayerNorm's output: x is saved; on a GPU autocast computes it in float32."""
        tape, work = self.tape, self.workload
        inputs = self.linears.to(states, 4 if work.device == "cuda" else states.each)
        made = tape.run([inputs, *gains], inputs.numbers, inputs.each, keeps=[inputs])
        tape.drop(inputs)
        if self.adapter.method == "bitfit":
            shifted = self.linears.shifted(made, self.model.hidden)
            return self.linears.in_place_of(made, shifted)
        return made

    def attention(self, states: Tensor) -> Tensor:
        """Return the attention block's output."""
        tape = self.tape
        mixed = self.of_fused(states) if self.model.fused else self.of_three(states)
        made = self.linears.linear(mixed, "dense" if self.model.fused else "o_proj")
        tape.drop(mixed)
        if self.adapter.method == "llama_adapter":
            return self.with_prompt(made, states)
        return self.with_bottleneck(made, made) if self.adapter.placement == "houlsby" else made

    def with_prompt(self, made: Tensor, states: Tensor) -> Tensor:
        """Return attention's output plus LLaMA-Adapter's attention to a trained prompt.

        Queries are computed once more; the softmax over the prompt is float32, and its gate saves it.
        """
        tape, adapter = self.tape, self.adapter
        query = self.turned(self.linears.linear(states, "q_proj"))
        mixed = self.scores.to_prompt(query, adapter.virtual_tokens)
        added = self.linears.linear(mixed, "o_proj")
        both = self.linears.add(made, added)
        tape.drop(query, mixed, made, added)
        return both

    def of_three(self, states: Tensor) -> Tensor:
        """Return attention over separate query, key and value projections."""
        query, key, value = (self.linears.linear(states, f"{name}_proj") for name in "qkv")
        query, key = self.turned(query), self.turned(key)
        made = self.scores.mixed(query, key, value, whole=value)
        self.tape.drop(query, key, value)
        return made

    def of_fused(self, states: Tensor) -> Tensor:
        """Return attention over views of one fused projection, which are interleaved per head."""
        tape, model, tokens = self.tape, self.model, self.workload.tokens
        fused = self.linears.linear(states, "query_key_value")
        views = tape.split(fused, [tokens * size for size in (model.queries, model.keys, model.keys)])
        query, key = self.rotated(views[0], model.queries), self.rotated(views[1], model.keys)
        mixed = self.scores.mixed(query, key, views[2], whole=fused)
        tape.drop(query, key, *views, fused)
        made = tape.run([mixed], mixed.numbers, mixed.each)  # contiguous()
        tape.drop(mixed)
        return made

    def turned(self, states: Tensor) -> Tensor:
        """Return queries or keys after their norm and rotary embedding; ``states`` is consumed."""
        if self.model.query_key_norm:
            normed = self.norm(states, self.model.head_dim)
            self.tape.drop(states)
            states = normed
        made = self.rotated(states, states.numbers // self.workload.tokens)
        self.tape.drop(states)
        return made

    def rotated(self, states: Tensor, width: int) -> Tensor:
        """Return x cos + rotate(x) sin (RoPE): two products; autograd saves only cosines and sines."""
        tape, numbers = self.tape, self.workload.tokens * width
        # cos and sin have the residual stream's dtype, which promotes the products.
        each = max(states.each, self.stream)
        straight = tape.run([states], numbers, each)
        tape.moment(numbers * states.each // 2, "activations")  # the negated half of rotate_half
        crossed = tape.run([states], numbers, states.each, workspace=2 * numbers * states.each)
        swung = tape.run([crossed], numbers, each)
        tape.drop(crossed)
        made = self.linears.add(straight, swung)
        tape.drop(straight, swung)
        return made

    def feed_forward(self, states: Tensor) -> Tensor:
        """Return the feed-forward block's output."""
        tape = self.tape
        inner = self.linears.linear(states, "gate_proj" if self.model.gated else "dense_h_to_4h")
        active = tape.run([inner], inner.numbers, inner.each, keeps=[inner])
        tape.drop(inner)
        # act(gate x) * (up x): both factors are saved for each other's gradient.
        if self.model.gated:
            up = self.linears.linear(states, "up_proj")
            product = tape.run([active, up], active.numbers, active.each, keeps=[active, up])
            tape.drop(active, up)
            active = product
        made = self.linears.linear(active, "down_proj" if self.model.gated else "dense_4h_to_h")
        tape.drop(active)
        # Houlsby inserts a bottleneck after attention and after the MLP; Pfeiffer and AdaMix after the MLP
        # alone.
        parallel = self.adapter.method == "bottleneck" and self.adapter.placement == "parallel"
        behind = self.adapter.method in BOTTLENECK and not parallel
        return self.with_bottleneck(made, made) if behind else made

    def with_bottleneck(self, made: Tensor, states: Tensor) -> Tensor:
        """Return a block's output plus a bottleneck's output for ``states``; the former is consumed."""
        added = self.linears.bottleneck(states)
        both = self.linears.add(made, added)
        self.tape.drop(made, added)
        return both
