"""Self-attention as simulated operations (fused kernels, eager, prefixes), and the cache of generation."""

from dataclasses import dataclass

from finetune.planner.adapted_linears import AdaptedLinears
from finetune.planner.architecture import Architecture
from finetune.planner.tape import Tape, Tensor
from finetune.planner.workload import Adapter, Workload

MASK_ALIGNMENT = 16
"""On a GPU the additive attention mask is padded to rows of a multiple of this."""
LOGITS_COPIES = 3
"""Float32 copies of one token's logits: raw, divided by the temperature, as probabilities."""


@dataclass(frozen=True)
class Attention:
    """The attention of one model on a tape."""

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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, value_base: Tensor) -> Tensor:
        """Return softmax(Q K^T) V.

        Args:
            query: after rotary embedding.
            key: after rotary embedding.
            value: the value projection's output.
            value_base: the tensor that ``value`` is a view of, or ``value`` itself.
        """
        tape = self.tape
        query, key = (
            self.linears.to(query, self.linears.itemsize),
            self.linears.to(key, self.linears.itemsize),
        )
        tape.retain(value)
        # The concatenation is a new tensor, so attention saves that and not the projection's output.
        if self.adapter.prefix_tokens:
            key, value = self.prepend_prefix(key), self.prepend_prefix(value)
            value_base = value
        # Without a mask the fused kernel reads grouped keys and values as they are (enable_gqa).
        if self.model.num_heads != self.model.num_kv_heads and (self.masked or self.eager):
            key, value = self.repeat_kv(key), self.repeat_kv(value)
            value_base = value
        output = (self.eager_attention if self.eager else self.fused_attention)(query, key, value, value_base)
        tape.release(query, key, value)
        return output

    @property
    def eager(self) -> bool:
        """Return whether the full score matrix is materialized."""
        return self.model.eager or self.workload.attention == "eager"

    @property
    def masked(self) -> bool:
        """Return whether attention takes a mask: for padding, block masks, or keys before the first query."""
        return self.workload.masked or self.adapter.prefix_tokens > 0

    @property
    def num_keys(self) -> int:
        """Return the number of keys per row, the prefix included."""
        return self.workload.positions + self.adapter.prefix_tokens

    def prepend_prefix(self, states: Tensor) -> Tensor:
        """Return keys or values with the prefix prepended, and release the ones without."""
        numel, prefix = self.workload.rows * self.num_keys * self.model.kv_width, self.prefix_weight
        prefixed = self.tape.apply([states, prefix], numel, self.linears.itemsize)
        self.tape.release(states)
        return prefixed

    @property
    def prefix_weight(self) -> Tensor:
        """Return the trained prefix of one layer's keys or values."""
        return self.tape.parameter(self.adapter.prefix_tokens * self.model.kv_width)

    def repeat_kv(self, states: Tensor) -> Tensor:
        """Return keys or values copied to every query head (GQA), and release the originals."""
        repeated = self.tape.apply(
            [states], self.workload.rows * self.num_keys * self.model.query_width, self.linears.itemsize
        )
        self.tape.release(states)
        return repeated

    def fused_attention(self, query: Tensor, key: Tensor, value: Tensor, value_base: Tensor) -> Tensor:
        """Return softmax(Q K^T) V by a fused kernel, which saves its inputs, its output and the log-sum-exp.

        FlashAttention (Dao et al. 2022, arXiv 2205.14135, section 3.1). A boolean mask is converted to an
        additive one in every layer, and saved. On a GPU the gradient of the queries is accumulated in
        float32.
        """
        tape, workload = self.tape, self.workload
        # One float32 log-sum-exp per query and head.
        logsumexp = tape.allocate(workload.rows * self.model.num_heads * workload.positions, 4)
        saved = [query, key, value_base, logsumexp]
        if self.masked:
            mask_width = (
                -(-self.num_keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
                if workload.device == "cuda"
                else self.num_keys
            )
            saved.append(
                tape.allocate(workload.rows * workload.positions * mask_width, self.linears.itemsize)
            )
        # FlashAttention's backward accumulates dQ in float32; the kernel for masks does not.
        query_grad_bytes = 4 * query.numel if workload.device == "cuda" and not self.masked else 0
        output = tape.apply(
            [query, key, value],
            query.numel,
            self.linears.itemsize,
            saved_for_backward=saved,
            saves_output=True,
            workspace=query_grad_bytes,
        )
        tape.release(logsumexp, *saved[4:])
        return output

    def eager_attention(self, query: Tensor, key: Tensor, value: Tensor, value_base: Tensor) -> Tensor:
        """Return eager attention: the score matrix is materialized, and the softmax is float32."""
        tape, workload = self.tape, self.workload
        # The score matrix is quadratic in the row length, and every step below is out of place.
        scores_numel = workload.rows * self.model.num_heads * workload.positions * self.num_keys
        scores = tape.apply(
            [query, key], scores_numel, self.linears.itemsize, saved_for_backward=[query, key]
        )
        for saves_output in [False, *([False, True, False] if self.model.eager else []), False]:
            output = tape.apply(
                [scores], scores_numel, self.linears.itemsize, saves_output=saves_output
            )  # scale, cap by a tanh, mask
            tape.release(scores)
            scores = output
        scores_fp32 = self.linears.to(scores, 4)
        probs = tape.apply([scores_fp32], scores_numel, 4, saves_output=True)
        tape.release(scores, scores_fp32)
        cast_probs = self.linears.to(probs, self.linears.itemsize)
        tape.release(probs)
        interleaved = tape.apply(
            [cast_probs, value],
            query.numel,
            self.linears.itemsize,
            saved_for_backward=[cast_probs, value_base],
        )
        tape.release(cast_probs)
        output = tape.apply([interleaved], query.numel, self.linears.itemsize)
        tape.release(interleaved)
        return output

    def prompt_attention(self, query: Tensor, tokens: int) -> Tensor:
        """Return gate * softmax(Q K^T) V for keys and values computed from a trained prompt."""
        tape, itemsize, scores_numel = (
            self.tape,
            self.linears.itemsize,
            query.numel // self.model.head_dim * tokens,
        )
        prompt = tape.parameter(tokens * self.model.hidden_size)
        scores = tape.apply([query, prompt], scores_numel, itemsize, saved_for_backward=[query])
        scaled = tape.apply([scores], scores_numel, itemsize)
        scores_fp32 = self.linears.to(scaled, 4)
        probs = tape.apply([scores_fp32], scores_numel, 4, saves_output=True)
        tape.release(scores, scaled, scores_fp32)
        cast_probs = self.linears.to(probs, itemsize)
        gated = tape.apply(
            [cast_probs, tape.parameter(1)], scores_numel, itemsize, saved_for_backward=[cast_probs]
        )
        weighted = tape.apply([gated, prompt], query.numel, itemsize, saved_for_backward=[gated])
        output = tape.apply([weighted], query.numel, itemsize)
        tape.release(probs, cast_probs, gated, weighted)
        return output


def decoding_memory(workload: Workload) -> dict[str, int]:
    """Return the memory in use when the last token of a completion is sampled.

    The key-value cache of all layers; appending copies one layer's cache at a time.
    """
    model, generation = workload.architecture, workload.rollout
    assert generation is not None
    layer_bytes = generation.rows * _num_positions(workload) * model.kv_width * workload.itemsize
    # Eager attention copies keys and values to every query head.
    repeated = model.num_heads // model.num_kv_heads if workload.attention == "eager" or model.eager else 0
    return {
        "key-value cache": kv_cache_bytes(workload),
        # Of the last position alone: in the compute dtype, and the float32 copies of sampling.
        "logits and loss": generation.rows * model.vocab_size * (workload.itemsize + 4 * LOGITS_COPIES),
        # Appending concatenates: the layer's new cache exists next to the old one.
        "workspace": layer_bytes * (1 + 2 * repeated),
    }


def kv_cache_bytes(workload: Workload) -> int:
    """Return the bytes of the KV cache; sliding-window layers cache their window alone."""
    model, generation = workload.architecture, workload.rollout
    assert generation is not None
    positions = _num_positions(workload)
    sliding = model.sliding_layers * min(positions, model.sliding_window)
    cached_positions = (model.num_layers - model.sliding_layers) * positions + sliding
    return 2 * cached_positions * generation.rows * model.kv_width * workload.itemsize


def _num_positions(workload: Workload) -> int:
    generation = workload.rollout
    assert generation is not None
    return generation.prompt + generation.completion + workload.adapter.virtual_tokens
