"""A forward and backward pass on the tape: embeddings, layers, head, loss."""

from finetune.planning.adapted import Linears
from finetune.planning.decoder import Decoder
from finetune.planning.tape import Tape, Tensor
from finetune.planning.workload import PARTED_GRADIENTS, Workload

MAX_ELEMENTS = 2**26
"""Logits whose softmax is taken at a time, as in finetune/training/loss.py."""
LOSS = "logits and loss"


def played(workload: Workload, *, in_place: bool = True) -> Tape:
    """Return the tape of one forward and backward pass.

    Args:
        workload: sizes.
        in_place: as ``Tape`` has it.
    """
    parts = workload.processes if workload.strategy in PARTED_GRADIENTS else 1
    tape = Tape(in_place=in_place, accumulating=workload.accumulated > 1, parts=parts)
    tape.backward(losses(tape, workload))
    return tape


def read(workload: Workload) -> Tape:
    """Return the tape of a pass without gradients: a reference, or what PPO asks of replies."""
    tape = Tape(recording=False)
    losses(tape, workload)
    return tape


def losses(tape: Tape, workload: Workload) -> Tensor:
    """Return the loss of a pass, by its objective."""
    found = [loss_of(tape, workload) for _ in range(workload.adapter.passes)]
    if workload.objective == "ppo":
        found.append(scored(tape, workload))
    elif workload.adapter.passes > 1:
        found.append(divergence(tape, workload, found))
    loss = tape.run(found, 1, 4)
    tape.drop(*found)
    return loss


def loss_of(tape: Tape, workload: Workload) -> Tensor:
    """Return the loss of what the base says of a pass's tokens."""
    if workload.objective == "scores":
        return scored(tape, workload)
    linears = Linears(tape, workload)
    states = Decoder(linears).layers(embedded(linears))
    logits = headed(linears, states)
    linears.forget_casts()
    found = (likelihood if workload.objective == "likelihood" else picked)(tape, workload, logits)
    tape.drop(logits)
    return found


def embedded(linears: Linears) -> Tensor:
    """Return the embeddings of a pass's tokens."""
    tape, work = linears.tape, linears.workload
    model, adapter = work.architecture, work.adapter
    numbers = work.tokens * model.hidden
    if adapter.whole_model:
        return tape.run([linears.table], numbers, 4)
    if adapter.method == "trainable_tokens":
        rows = tape.weight(adapter.tokens * model.hidden)
        table = tape.run([rows], model.vocabulary * model.hidden, work.bytes)
        states = tape.run([table], numbers, work.bytes)
        tape.drop(table)
        return states
    states = tape.new(numbers, work.bytes)
    states.learns = tape.recording and (work.checkpointing or adapter.written > 0)
    return states


def headed(linears: Linears, states: Tensor) -> Tensor:
    """Return the logits of the N predicted states; the caller holds ``states`` no more.

    Accelerate turns what the wrapped model gives into float32. PPO's models are wrapped together, and give
    tables; their logits stay as they are.
    """
    tape, work = linears.tape, linears.workload
    model = work.architecture
    chosen = tape.run([states], work.predicted * model.hidden, states.each)
    tape.drop(states)
    inputs = linears.to(chosen, work.bytes)
    tape.drop(chosen)
    weight = [linears.head] if work.adapter.whole_model else []
    keeps = [inputs, *weight] if weight else []
    logits = tape.run(
        [inputs, *weight], work.predicted * model.vocabulary, work.bytes, keeps=keeps, part=LOSS
    )
    tape.drop(inputs)
    if model.softcap:
        logits = capped(tape, logits)
    if work.objective == "ppo" or not tape.recording:
        return logits
    wide = linears.to(logits, 4)
    tape.drop(logits)
    return wide


def capped(tape: Tape, logits: Tensor) -> Tensor:
    """Return c tanh(x / c), in the place of x; the tanh is kept."""
    for keeps in (False, True, False):
        made = tape.run([logits], logits.numbers, logits.each, keeps_result=keeps)
        tape.drop(logits)
        logits = made
    return logits


def chunked(tape: Tape, workload: Workload, logits: Tensor) -> list[Tensor]:
    """Return views of the logits, of as many rows as fit into ``MAX_ELEMENTS``."""
    vocabulary = workload.architecture.vocabulary
    rows = max(1, MAX_ELEMENTS // vocabulary)
    whole, rest = divmod(logits.numbers // vocabulary, rows)
    sizes = [rows * vocabulary] * whole + [rest * vocabulary] * (rest > 0)
    return tape.split(logits, sizes)


def likelihood(tape: Tape, workload: Workload, logits: Tensor) -> Tensor:
    """Return the cross-entropy of some logits: the softmax is kept.

    Above ``MAX_ELEMENTS`` it is taken chunk by chunk, and each chunk again in the backward pass; the logits
    are kept, and the chunks' gradients are joined at the end.
    """
    if logits.numbers <= MAX_ELEMENTS:
        wide = float32(tape, logits)
        found = tape.run([wide], wide.numbers, 4, keeps_result=True)
        loss = tape.run([found], 1, 4)
        tape.drop(wide, found)
        return loss
    chunks = chunked(tape, workload, logits)
    sums = []
    for chunk in chunks:
        tape.moment(4 * chunk.numbers, LOSS)
        sums.append(tape.run([chunk], 1, 4, keeps=[logits], workspace=2 * 4 * chunk.numbers))
    loss = tape.run(sums, 1, 4)
    tape.drop(*chunks, *sums)
    return loss


def picked(tape: Tape, workload: Workload, logits: Tensor) -> Tensor:
    """Return log-probabilities of targets: a logit less the logarithm of the sum, for which logits are kept.

    Its gradient takes x - log sum and its exponential.
    """
    chunks = [logits] if logits.numbers <= MAX_ELEMENTS else chunked(tape, workload, logits)
    found = []
    for chunk in chunks:
        wide = float32(tape, chunk)
        own = tape.run([wide], 1, 4)
        sums = tape.run(
            [wide], 1, 4, keeps=[wide if wide is not chunk else logits], workspace=2 * 4 * wide.numbers
        )
        tape.moment(4 * wide.numbers, LOSS)
        found += [own, sums]
        tape.drop(wide)
    loss = tape.run(found, 1, 4)
    tape.drop(*found, *(chunks if chunks[0] is not logits else []))
    return loss


def float32(tape: Tape, logits: Tensor) -> Tensor:
    """Return logits as float32."""
    if logits.each == 4:
        tape.hold(logits)
        return logits
    return tape.run([logits], logits.numbers, 4)


def divergence(tape: Tape, workload: Workload, found: list[Tensor]) -> Tensor:
    """Return AdaMix's divergence of two passes: two softmaxes, their exponentials, and both differences."""
    numbers = workload.predicted * workload.architecture.vocabulary
    kept = [tape.new(numbers, 4, LOSS) for _ in range(6)]
    made = tape.run(found, 1, 4, keeps=kept, workspace=2 * 4 * numbers)
    tape.drop(*kept)
    return made


def scored(tape: Tape, workload: Workload) -> Tensor:
    """Return what a float32 head of scores makes of all states, which it keeps in float32."""
    linears = Linears(tape, workload)
    states = Decoder(linears).layers(embedded(linears))
    linears.forget_casts()
    wide = linears.to(states, 4)
    tape.drop(states)
    head = tape.weight(max(1, workload.heads) * workload.architecture.hidden)
    made = tape.run([wide, head], workload.tokens * max(1, workload.heads), 4, keeps=[wide])
    tape.drop(wide)
    loss = tape.run([made], 1, 4)
    tape.drop(made)
    return loss
