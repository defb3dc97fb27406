"""Self-attention as simulated operations: fused kernels (SDPA, FlashAttention), eager attention, prefixes."""

from dataclasses import dataclass

from finetune.planning.adapted import Linears
from finetune.planning.architecture import Architecture
from finetune.planning.tape import Tape, Tensor
from finetune.planning.workload import Adapter, Workload

FLASH_ALIGNED = 16
"""On a GPU the additive attention mask is padded to rows of a multiple of this."""


@dataclass(frozen=True)
class Attention:
    """The attention of one model on a tape."""

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

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, *, whole: Tensor) -> Tensor:
        """Return softmax(Q K^T) V.

        Args:
            query: after rotary embedding.
            key: after rotary embedding.
            value: the value projection's output.
            value_base: the buffer that ``value`` is a view of, or ``value`` itself.
        """
        tape = self.tape
        query, key = self.linears.to(query, self.linears.each), self.linears.to(key, self.linears.each)
        tape.hold(value)
        # The concatenation is a new buffer, so attention saves that and not the projection's output.
        if self.adapter.cached:
            key, value = self.behind_prefix(key), self.behind_prefix(value)
            whole = value
        # Without a mask the fused kernel reads grouped keys and values as they are (enable_gqa).
        if self.model.heads != self.model.key_value_heads and (self.masked or self.eager):
            key, value = self.repeated(key), self.repeated(value)
            whole = value
        made = (self.written_out if self.eager else self.fused)(query, key, value, whole)
        tape.drop(query, key, value)
        return made

    @property
    def eager(self) -> bool:
        """Return whether the full score matrix is materialized."""
        return self.model.eager or self.workload.attention == "eager"

    @property
    def masked(self) -> bool:
        """Return whether attention takes a mask: for padding, block masks, or keys before the first query."""
        return self.workload.masked or self.adapter.cached > 0

    @property
    def seen(self) -> int:
        """Return the number of keys per row, the prefix included."""
        return self.workload.width + self.adapter.cached

    def behind_prefix(self, states: Tensor) -> Tensor:
        """Return keys or values with the prefix prepended, and release the ones without."""
        numbers, prefix = self.workload.lines * self.seen * self.model.keys, self.prefix
        made = self.tape.run([states, prefix], numbers, self.linears.each)
        self.tape.drop(states)
        return made

    @property
    def prefix(self) -> Tensor:
        """Return the trained prefix of one layer's keys or values."""
        return self.tape.weight(self.adapter.cached * self.model.keys)

    def repeated(self, states: Tensor) -> Tensor:
        """Return keys or values copied to every query head (GQA), and release the originals."""
        made = self.tape.run(
            [states], self.workload.lines * self.seen * self.model.queries, self.linears.each
        )
        self.tape.drop(states)
        return made

    def fused(self, query: Tensor, key: Tensor, value: Tensor, held: Tensor) -> Tensor:
        """Return softmax(Q K^T) V by a fused kernel, which saves its inputs, its output and the log-sum-exp.

        FlashAttention (Dao et al. 2022, arXiv 2205.14135, section 3.1). A boolean mask is converted to an
        additive one in every layer, and saved. On a GPU the gradient of the queries is accumulated in
        float32.
        """
        tape, work = self.tape, self.workload
        # One float32 log-sum-exp per query and head.
        sums = tape.new(work.lines * self.model.heads * work.width, 4)
        kept = [query, key, held, sums]
        if self.masked:
            line = -(-self.seen // FLASH_ALIGNED) * FLASH_ALIGNED if work.device == "cuda" else self.seen
            kept.append(tape.new(work.lines * work.width * line, self.linears.each))
        # FlashAttention's backward accumulates dQ in float32; the kernel for masks does not.
        own = 4 * query.numbers if work.device == "cuda" and not self.masked else 0
        made = tape.run(
            [query, key, value],
            query.numbers,
            self.linears.each,
            keeps=kept,
            keeps_result=True,
            workspace=own,
        )
        tape.drop(sums, *kept[4:])
        return made

    def written_out(self, query: Tensor, key: Tensor, value: Tensor, held: Tensor) -> Tensor:
        """Return eager attention: the score matrix is materialized, and the softmax is float32."""
        tape, work = self.tape, self.workload
        # The score matrix is quadratic in the row length, and every step below is out of place.
        scores = work.lines * self.model.heads * work.width * self.seen
        found = tape.run([query, key], scores, self.linears.each, keeps=[query, key])
        for keeps in [False, *([False, True, False] if self.model.eager else []), False]:
            made = tape.run(
                [found], scores, self.linears.each, keeps_result=keeps
            )  # scale, cap by a tanh, mask
            tape.drop(found)
            found = made
        wide = self.linears.to(found, 4)
        shares = tape.run([wide], scores, 4, keeps_result=True)
        tape.drop(found, wide)
        narrow = self.linears.to(shares, self.linears.each)
        tape.drop(shares)
        mixed = tape.run([narrow, value], query.numbers, self.linears.each, keeps=[narrow, held])
        tape.drop(narrow)
        made = tape.run([mixed], query.numbers, self.linears.each)
        tape.drop(mixed)
        return made

    def to_prompt(self, query: Tensor, tokens: int) -> Tensor:
        """Return gate * softmax(Q K^T) V for keys and values computed from a trained prompt."""
        tape, each, numbers = self.tape, self.linears.each, query.numbers // self.model.head_dim * tokens
        prompt = tape.weight(tokens * self.model.hidden)
        found = tape.run([query, prompt], numbers, each, keeps=[query])
        scaled = tape.run([found], numbers, each)
        wide = self.linears.to(scaled, 4)
        shares = tape.run([wide], numbers, 4, keeps_result=True)
        tape.drop(found, scaled, wide)
        narrow = self.linears.to(shares, each)
        gated = tape.run([narrow, tape.weight(1)], numbers, each, keeps=[narrow])
        mixed = tape.run([gated, prompt], query.numbers, each, keeps=[gated])
        made = tape.run([mixed], query.numbers, each)
        tape.drop(shares, narrow, gated, mixed)
        return made
