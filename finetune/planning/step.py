"""Simulation of one forward and backward pass: embeddings, layers, output head, cross-entropy or scores."""

from finetune.planning.adapted import Linears
from finetune.planning.decoder import Decoder
from finetune.planning.tape import Tape, Tensor
from finetune.planning.workload import PARTED_GRADIENTS, Workload

MAX_ELEMENTS = 2**26
"""Logits per softmax chunk, as in finetune/training/loss.py."""
LOSS = "logits and loss"


def played(workload: Workload, *, in_place: bool = True) -> Tape:
    """Simulate one forward and backward pass and return its tape.

    Args:
        workload: sizes.
        in_place: see ``Tape``.
    """
    parts = workload.processes if workload.strategy in PARTED_GRADIENTS else 1
    tape = Tape(in_place=in_place, accumulating=workload.accumulated > 1, parts=parts)
    tape.backward(losses(tape, workload))
    return tape


def read(workload: Workload) -> Tape:
    """Simulate a forward pass under no_grad (a reference, PPO's scoring) and return its tape."""
    tape = Tape(recording=False)
    losses(tape, workload)
    return tape


def losses(tape: Tape, workload: Workload) -> Tensor:
    """Return the loss of a micro-batch by its objective."""
    found = [loss_of(tape, workload) for _ in range(workload.adapter.passes)]
    # The value model runs on the same tokens, in the same step as the policy.
    if workload.objective == "ppo":
        found.append(scored(tape, workload))
    elif workload.adapter.passes > 1:
        found.append(divergence(tape, workload, found))
    loss = tape.run(found, 1, 4)
    tape.drop(*found)
    return loss


def loss_of(tape: Tape, workload: Workload) -> Tensor:
    """Return the loss of one forward pass."""
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
    """Return the token embeddings."""
    tape, work = linears.tape, linears.workload
    model, adapter = work.architecture, work.adapter
    numbers = work.tokens * model.hidden
    if adapter.whole_model:
        return tape.run([linears.table], numbers, 4)
    if adapter.method == "trainable_tokens":
        rows = tape.weight(adapter.tokens * model.hidden)
        # PEFT builds a full embedding matrix with the trained rows in every pass.
        table = tape.run([rows], model.vocabulary * model.hidden, work.bytes)
        states = tape.run([table], numbers, work.bytes)
        tape.drop(table)
        return states
    states = tape.new(numbers, work.bytes)
    # Frozen embeddings require a gradient under checkpointing (enable_input_require_grads) or where virtual
    # tokens are prepended.
    states.learns = tape.recording and (work.checkpointing or adapter.written > 0)
    return states


def headed(linears: Linears, states: Tensor) -> Tensor:
    """Return the logits of the N predicted states; ``states`` is consumed.

    Accelerate converts the outputs of the prepared model to float32. PPO's models are prepared together and
    return log-probabilities; their logits keep the compute dtype.
    """
    tape, work = linears.tape, linears.workload
    model = work.architecture
    # The output head runs on the positions before a label alone: logits dominate memory otherwise.
    chosen = tape.run([states], work.predicted * model.hidden, states.each)
    tape.drop(states)
    inputs = linears.to(chosen, work.bytes)
    tape.drop(chosen)
    # A frozen head saves nothing: its gradient for the states needs the weight alone.
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
    """Return c tanh(x / c) and release x; the tanh is saved."""
    for keeps in (False, True, False):
        made = tape.run([logits], logits.numbers, logits.each, keeps_result=keeps)
        tape.drop(logits)
        logits = made
    return logits


def chunked(tape: Tape, workload: Workload, logits: Tensor) -> list[Tensor]:
    """Return views of the logits with at most ``MAX_LOGITS_PER_CHUNK`` elements each."""
    vocabulary = workload.architecture.vocabulary
    rows = max(1, MAX_ELEMENTS // vocabulary)
    whole, rest = divmod(logits.numbers // vocabulary, rows)
    sizes = [rows * vocabulary] * whole + [rest * vocabulary] * (rest > 0)
    return tape.split(logits, sizes)


def likelihood(tape: Tape, workload: Workload, logits: Tensor) -> Tensor:
    """Return the cross-entropy: the softmax is saved.

    Above ``MAX_LOGITS_PER_CHUNK`` it is computed chunk by chunk, and recomputed in the backward pass; the
    logits are saved, and the gradients of the chunks are joined at the end.
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
        # The float32 softmax of one chunk is freed before the next chunk.
        tape.moment(4 * chunk.numbers, LOSS)
        sums.append(tape.run([chunk], 1, 4, keeps=[logits], workspace=2 * 4 * chunk.numbers))
    loss = tape.run(sums, 1, 4)
    tape.drop(*chunks, *sums)
    return loss


def picked(tape: Tape, workload: Workload, logits: Tensor) -> Tensor:
    """Return log-probabilities of the targets: a logit minus the log-sum-exp, for which the logits are saved.

    The backward pass allocates x - logsumexp and its exponential.
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
    """Return the logits in float32."""
    if logits.each == 4:
        tape.hold(logits)
        return logits
    return tape.run([logits], logits.numbers, 4)


def divergence(tape: Tape, workload: Workload, found: list[Tensor]) -> Tensor:
    """Return AdaMix's KL divergence of two passes: two softmaxes, their exponentials, both differences."""
    numbers = workload.predicted * workload.architecture.vocabulary
    kept = [tape.new(numbers, 4, LOSS) for _ in range(6)]
    made = tape.run(found, 1, 4, keeps=kept, workspace=2 * 4 * numbers)
    tape.drop(*kept)
    return made


def scored(tape: Tape, workload: Workload) -> Tensor:
    """Return the loss on a float32 score head (reward, value), which saves the states in float32."""
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
