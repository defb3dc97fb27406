"""Decoder layers as simulated operations, in the order in which transformers and PEFT compute them.

Calling convention: a method borrows its input tensors, and the caller owns the output.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune.planner.adapted_linears import AdaptedLinears
from finetune.planner.architecture import Architecture
from finetune.planner.attention import Attention
from finetune.planner.tape import Operation, Tape, Tensor
from finetune.planner.workload import BOTTLENECK_METHODS, Adapter, Workload

SIMULATED_LAYERS = 3
"""Layers that are simulated: the first, which may have no gradient before it, a middle one, and the last."""


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one layer leaves in memory.

    Attributes:
        saved_bytes: bytes by category.
        grad_bytes: bytes of its weight gradients.
        autocast_bytes: bytes of autocast's weight copies among the saved ones.
    """

    saved_bytes: Mapping[str, int]
    grad_bytes: int
    autocast_bytes: int


@dataclass
class Decoder:
    """One model's layers on a tape.

    Attributes:
        linears: its linear layers.
    """

    linears: AdaptedLinears

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
    def itemsize(self) -> int:
        """Return the bytes per element of a linear layer's output."""
        return self.workload.itemsize

    @property
    def residual_itemsize(self) -> int:
        """Return the bytes per element of the residual stream, which has the dtype of the stored weights."""
        return 4 if self.adapter.full_finetuning else self.itemsize

    @property
    def core_attention(self) -> Attention:
        return Attention(self.linears)

    def forward(self, states: Tensor) -> Tensor:
        """Return the hidden states after all layers and the final norm; ``states`` is consumed.

        All middle layers are alike. Live memory at a given point of a layer changes linearly with the layer's
        index, so the peak is in the first or in the last layer; the layers between are added as one block.
        """
        tape, count = self.tape, self.model.num_layers
        if self.adapter.method == "llama_adapter":  # the layers below have no gradient and save nothing
            count = min(count, self.adapter.top_layers)
        for index in range(min(count, SIMULATED_LAYERS)):
            live_before, grad_bytes, num_cached = (
                dict(tape.live_by_category),
                tape.param_grad_bytes,
                len(self.linears.autocast_cache),
            )
            output = self.checkpointed_layer(states) if self.workload.checkpointing else self.layer(states)
            tape.release(states)
            states = output
            # The middle layer's footprint is multiplied by the number of layers that are not simulated.
            if index == SIMULATED_LAYERS - 2 and count > SIMULATED_LAYERS:
                saved_bytes = {
                    category: nbytes - live_before.get(category, 0)
                    for category, nbytes in tape.live_by_category.items()
                }
                autocast_bytes = sum(cast.nbytes for cast in self.linears.autocast_cache[num_cached:])
                layer_memory = LayerMemory(saved_bytes, tape.param_grad_bytes - grad_bytes, autocast_bytes)
                states = self.repeat_layer(states, layer_memory, count - SIMULATED_LAYERS)
        last = self.norm(states, self.model.hidden_size)
        tape.release(states)
        return last

    def repeat_layer(self, states: Tensor, layer_memory: LayerMemory, count: int) -> Tensor:
        """Return the hidden states after ``count`` more layers like the last one; ``states`` is consumed."""
        tape, output = self.tape, self.tape.allocate(states.numel, states.itemsize)
        saved_bytes = dict(layer_memory.saved_bytes)
        tape.param_grad_bytes += count * layer_memory.grad_bytes
        if self.workload.checkpointing or not tape.grad_enabled:
            # Only autocast's cache holds the weight copies then; no operation saved them.
            saved_bytes["activations"] = saved_bytes.get("activations", 0) - layer_memory.autocast_bytes
            self.linears.autocast_cache.append(tape.allocate(count * layer_memory.autocast_bytes, 1))
        blocks = [tape.allocate(count * nbytes, 1, category) for category, nbytes in saved_bytes.items()]

        def backward(grad: Tensor) -> None:
            tape.release(*blocks)
            if not tape.accumulating:
                tape.allocate(count * layer_memory.grad_bytes, 1, "gradients")
            tape.accumulate_grad(states, grad)

        if tape.grad_enabled and states.requires_grad:
            tape.record(Operation(output, [states], [], backward_fn=backward))
        tape.release(states)
        return output

    def checkpointed_layer(self, states: Tensor) -> Tensor:
        """Return a layer's output under gradient checkpointing: its input is saved, the rest recomputed.

        Chen et al. 2016 (arXiv 1604.06174), section 4; PyTorch's non-reentrant form.
        """
        tape, grad_enabled = self.tape, self.tape.grad_enabled
        # The first forward pass runs under no_grad: nothing inside the layer is saved.
        tape.grad_enabled = False
        output = self.layer(states)
        tape.grad_enabled = grad_enabled
        if grad_enabled:
            tape.retain(states)
            tape.record(Operation(output, [states], [states], backward_fn=self._recompute(states)))
        return output

    def _recompute(self, states: Tensor) -> Callable[[Tensor], None]:
        def backward(grad: Tensor) -> None:
            tape, outer_linears = self.tape, self.linears
            # Like torch.utils.checkpoint: the recomputed layer has its own graph and autocast cache.
            outer_operations, tape.operations = tape.operations, []
            self.linears = AdaptedLinears(tape, outer_linears.workload)
            output = self.layer(states)
            self.linears.clear_autocast_cache()
            tape.release(output)
            output.grad = grad
            tape.run_backward()
            tape.operations, self.linears = outer_operations, outer_linears

        return backward

    def layer(self, states: Tensor) -> Tensor:
        model, tape = self.model, self.tape
        normed = self.pre_norm(states)
        attention_output = self.attention(normed)
        tape.release(normed)
        if model.post_norms:
            attention_output = self.post_norm(attention_output)
        # GPT-NeoX: attention and feed-forward block read the same input, and both outputs are added at the
        # end.
        residual = states if model.parallel_residual else self.linears.add(states, attention_output)
        normed = self.pre_norm(residual)
        mlp_output = self.feed_forward(normed)
        if self.adapter.method == "bottleneck" and self.adapter.placement == "parallel":
            mlp_output = self.add_bottleneck(mlp_output, normed)
        tape.release(normed)
        if model.post_norms:
            mlp_output = self.post_norm(mlp_output)
        if model.parallel_residual:
            block_output = self.linears.add(mlp_output, attention_output)
            output = self.linears.add(block_output, states)
            tape.release(block_output)
        else:
            output = self.linears.add(residual, mlp_output)
            tape.release(residual)
        tape.release(attention_output, mlp_output)
        return output

    def pre_norm(self, states: Tensor) -> Tensor:
        """Return the input of a block: a norm's output, or in OLMo 2 and EXAONE 4 the states themselves."""
        if self.model.pre_norms:
            return self.norm(states, self.model.hidden_size)
        self.tape.retain(states)
        return states

    def post_norm(self, states: Tensor) -> Tensor:
        """Return the post-norm of a block's output, which is consumed."""
        normed = self.norm(states, self.model.hidden_size)
        self.tape.release(states)
        return normed

    def norm(self, states: Tensor, width: int) -> Tensor:
        """Return a norm's output.

        RMSNorm saves x in float32 and 1/rms for x / rms; with trained gains also x / rms. LayerNorm saves x,
        under autocast in float32, and its output is float32.
        """
        tape, rows = self.tape, states.numel // width
        trained = self.adapter.full_finetuning or self.adapter.method == "layernorm"
        gains = [tape.parameter(width)] if trained else []
        if self.model.layer_norm:
            return self.layer_norm(states, gains)
        states_fp32 = self.linears.to(states, 4)
        tape.allocate_temporary(states_fp32.nbytes, "activations")  # x ** 2
        scale = tape.apply(
            [states_fp32],
            rows,
            4,
            saved_for_backward=[states_fp32],
            saves_output=True,
            workspace=3 * states_fp32.nbytes,
        )
        scaled = tape.apply(
            [states_fp32, scale], states_fp32.numel, 4, saved_for_backward=[states_fp32, scale]
        )
        tape.release(states_fp32, scale)
        if self.model.float32_gains:  # Gemma and OLMo 2 multiply in float32, and cast the product
            output = self.scale_by_gains(scaled, gains)
            tape.release(scaled)
            return self.cast(output, states.itemsize)
        cast_states = self.cast(scaled, states.itemsize)
        output = self.scale_by_gains(cast_states, gains)
        tape.release(cast_states)
        return output

    def scale_by_gains(self, states: Tensor, gains: list[Tensor]) -> Tensor:
        """Return x times a norm's gains; x is saved if they are trained."""
        saved = [states] if gains else []
        return self.tape.apply([states, *gains], states.numel, states.itemsize, saved_for_backward=saved)

    def cast(self, states: Tensor, itemsize: int) -> Tensor:
        """Return a tensor with this itemsize; ``states`` is consumed."""
        cast_states = self.linears.to(states, itemsize)
        self.tape.release(states)
        return cast_states

    def layer_norm(self, states: Tensor, gains: list[Tensor]) -> Tensor:
        """Return LayerNorm's output: x is saved; on a GPU autocast computes it in float32."""
        tape, workload = self.tape, self.workload
        inputs = self.linears.to(states, 4 if workload.device == "cuda" else states.itemsize)
        output = tape.apply([inputs, *gains], inputs.numel, inputs.itemsize, saved_for_backward=[inputs])
        tape.release(inputs)
        if self.adapter.method == "bitfit":
            shifted = self.linears.add_bias(output, self.model.hidden_size)
            return self.linears.replace_output(output, shifted)
        return output

    def attention(self, states: Tensor) -> Tensor:
        """Return the attention block's output."""
        tape = self.tape
        attended = (
            self.fused_qkv_attention(states) if self.model.fused_qkv else self.separate_qkv_attention(states)
        )
        output = self.linears.linear(attended, "dense" if self.model.fused_qkv else "o_proj")
        tape.release(attended)
        if self.adapter.method == "llama_adapter":
            return self.add_prompt_attention(output, states)
        return self.add_bottleneck(output, output) if self.adapter.placement == "houlsby" else output

    def add_prompt_attention(self, attention_output: Tensor, states: Tensor) -> Tensor:
        """Return attention's output plus LLaMA-Adapter's attention to a trained prompt.

        Queries are computed once more; the softmax over the prompt is float32, and its gate saves it.
        """
        tape, adapter = self.tape, self.adapter
        query = self.norm_and_rotate(self.linears.linear(states, "q_proj"))
        prompt_output = self.core_attention.prompt_attention(query, adapter.virtual_tokens)
        prompt_update = self.linears.linear(prompt_output, "o_proj")
        output = self.linears.add(attention_output, prompt_update)
        tape.release(query, prompt_output, attention_output, prompt_update)
        return output

    def separate_qkv_attention(self, states: Tensor) -> Tensor:
        """Return attention over separate query, key and value projections."""
        query, key, value = (self.linears.linear(states, f"{name}_proj") for name in "qkv")
        query, key = self.norm_and_rotate(query), self.norm_and_rotate(key)
        output = self.core_attention.forward(query, key, value, value_base=value)
        self.tape.release(query, key, value)
        return output

    def fused_qkv_attention(self, states: Tensor) -> Tensor:
        """Return attention over views of one fused projection, which are interleaved per head."""
        tape, model, tokens = self.tape, self.model, self.workload.tokens
        fused = self.linears.linear(states, "query_key_value")
        views = tape.split(
            fused, [tokens * size for size in (model.query_width, model.kv_width, model.kv_width)]
        )
        query, key = self.apply_rope(views[0], model.query_width), self.apply_rope(views[1], model.kv_width)
        attended = self.core_attention.forward(query, key, views[2], value_base=fused)
        tape.release(query, key, *views, fused)
        output = tape.apply([attended], attended.numel, attended.itemsize)  # contiguous()
        tape.release(attended)
        return output

    def norm_and_rotate(self, states: Tensor) -> Tensor:
        """Return queries or keys after their norm and rotary embedding; ``states`` is consumed."""
        if self.model.query_key_norm:
            wide = self.model.wide_query_key_norm
            width = states.numel // self.workload.tokens if wide else self.model.head_dim
            normed = self.norm(states, width)
            self.tape.release(states)
            states = normed
        rotated = self.apply_rope(states, states.numel // self.workload.tokens)
        self.tape.release(states)
        return rotated

    def apply_rope(self, states: Tensor, width: int) -> Tensor:
        """Return x cos + rotate(x) sin (RoPE): two products; autograd saves only cosines and sines."""
        tape, numel = self.tape, self.workload.tokens * width
        # cos and sin have the residual stream's dtype, which promotes the products.
        itemsize = max(states.itemsize, self.residual_itemsize)
        cos_product = tape.apply([states], numel, itemsize)
        tape.allocate_temporary(
            numel * states.itemsize // 2, "activations"
        )  # the negated half of rotate_half
        rotated_half = tape.apply([states], numel, states.itemsize, workspace=2 * numel * states.itemsize)
        sin_product = tape.apply([rotated_half], numel, itemsize)
        tape.release(rotated_half)
        output = self.linears.add(cos_product, sin_product)
        tape.release(cos_product, sin_product)
        return output

    def feed_forward(self, states: Tensor) -> Tensor:
        """Return the feed-forward block's output."""
        tape = self.tape
        inner = self.linears.linear(states, "gate_proj" if self.model.gated else "dense_h_to_4h")
        active = tape.apply([inner], inner.numel, inner.itemsize, saved_for_backward=[inner])
        tape.release(inner)
        # act(gate x) * (up x): both factors are saved for each other's gradient.
        if self.model.gated:
            up = self.linears.linear(states, "up_proj")
            product = tape.apply([active, up], active.numel, active.itemsize, saved_for_backward=[active, up])
            tape.release(active, up)
            active = product
        output = self.linears.linear(active, "down_proj" if self.model.gated else "dense_4h_to_h")
        tape.release(active)
        # Houlsby inserts a bottleneck after attention and after the MLP; Pfeiffer and AdaMix after the MLP
        # alone.
        parallel = self.adapter.method == "bottleneck" and self.adapter.placement == "parallel"
        is_sequential = self.adapter.method in BOTTLENECK_METHODS and not parallel
        return self.add_bottleneck(output, output) if is_sequential else output

    def add_bottleneck(self, block_output: Tensor, states: Tensor) -> Tensor:
        """Return a block's output plus a bottleneck's output for ``states``; the former is consumed."""
        bottleneck_output = self.linears.bottleneck(states)
        output = self.linears.add(block_output, bottleneck_output)
        self.tape.release(block_output, bottleneck_output)
        return output
