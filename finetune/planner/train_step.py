"""Simulation of one forward and backward pass: embeddings, layers, output head, cross-entropy or scores."""

from finetune.distributed.strategies import SHARDED_GRADIENTS
from finetune.planner.adapted_linears import AdaptedLinears
from finetune.planner.decoder import Decoder
from finetune.planner.tape import Tape, Tensor
from finetune.planner.workload import Workload

MAX_LOGITS_PER_CHUNK = 2**26
"""Logits per softmax chunk, as in finetune/training/loss.py."""
LOGITS_CATEGORY = "logits and loss"


def simulate_train_step(workload: Workload, *, in_place: bool = True) -> Tape:
    """Simulate one forward and backward pass and return its tape.

    Args:
        workload: sizes.
        in_place: see ``Tape``.
    """
    grad_shards = workload.processes if workload.strategy in SHARDED_GRADIENTS else 1
    tape = Tape(in_place=in_place, accumulating=workload.accumulation_steps > 1, grad_shards=grad_shards)
    tape.backward(total_loss(tape, workload))
    return tape


def simulate_forward(workload: Workload) -> Tape:
    """Simulate a forward pass under no_grad (a reference, PPO's scoring) and return its tape."""
    tape = Tape(grad_enabled=False)
    total_loss(tape, workload)
    return tape


def total_loss(tape: Tape, workload: Workload) -> Tensor:
    """Return the loss of a micro-batch by its objective."""
    losses = [forward_loss(tape, workload) for _ in range(workload.adapter.forward_passes)]
    # The value model runs on the same tokens, in the same step as the policy.
    if workload.objective == "ppo":
        losses.append(score_loss(tape, workload))
    elif workload.adapter.forward_passes > 1:
        losses.append(consistency_loss(tape, workload, losses))
    loss = tape.apply(losses, 1, 4)
    tape.release(*losses)
    return loss


def forward_loss(tape: Tape, workload: Workload) -> Tensor:
    """Return the loss of one forward pass."""
    if workload.objective == "scores":
        return score_loss(tape, workload)
    linears = AdaptedLinears(tape, workload)
    states = Decoder(linears).forward(embed_tokens(linears))
    logits = compute_logits(linears, states)
    linears.clear_autocast_cache()
    loss = (cross_entropy if workload.objective == "likelihood" else target_logps)(tape, workload, logits)
    tape.release(logits)
    return loss


def embed_tokens(linears: AdaptedLinears) -> Tensor:
    """Return the token embeddings."""
    tape, workload = linears.tape, linears.workload
    model, adapter = workload.architecture, workload.adapter
    numel = workload.tokens * model.hidden_size
    if adapter.full_finetuning:
        return tape.apply([linears.embeddings], numel, 4)
    if adapter.method == "trainable_tokens":
        table = linears.token_table()
        states = tape.apply([table], numel, workload.itemsize)
        tape.release(table)
        return states
    states = tape.allocate(numel, workload.itemsize)
    # Frozen embeddings require a gradient under checkpointing (enable_input_require_grads) or where virtual
    # tokens are prepended.
    states.requires_grad = tape.grad_enabled and (workload.checkpointing or adapter.prepended_tokens > 0)
    return states


def compute_logits(linears: AdaptedLinears, states: Tensor) -> Tensor:
    """Return the logits of the N predicted states; ``states`` is consumed.

    Accelerate converts the outputs of the prepared model to float32. PPO's models are prepared together and
    return log-probabilities; their logits keep the compute dtype.
    """
    tape, workload = linears.tape, linears.workload
    model = workload.architecture
    # The output head runs on the positions before a label alone: logits dominate memory otherwise.
    predicted_states = tape.apply([states], workload.predicted * model.hidden_size, states.itemsize)
    tape.release(states)
    inputs = linears.to(predicted_states, workload.itemsize)
    tape.release(predicted_states)
    # A frozen head saves nothing: its gradient for the states needs the weight alone.
    table = (
        [linears.token_table()]
        if workload.adapter.method == "trainable_tokens" and model.tied_embeddings
        else []
    )
    # PEFT makes a copy of the embeddings for a tied head too.
    weight = [linears.output_head] if workload.adapter.full_finetuning else table
    saved = [inputs, *weight] if weight else []
    logits = tape.apply(
        [inputs, *weight],
        workload.predicted * model.vocab_size,
        workload.itemsize,
        saved_for_backward=saved,
        category=LOGITS_CATEGORY,
    )
    tape.release(inputs, *table)
    if model.softcap:
        logits = softcap_logits(tape, logits)
    if workload.objective == "ppo" or not tape.grad_enabled:
        return logits
    logits_fp32 = linears.to(logits, 4)
    tape.release(logits)
    return logits_fp32


def softcap_logits(tape: Tape, logits: Tensor) -> Tensor:
    """Return c tanh(x / c) and release x; the tanh is saved."""
    # Division by c, tanh, product with c: three allocations, and the tanh's gradient needs its output.
    for saves_output in (False, True, False):
        output = tape.apply([logits], logits.numel, logits.itemsize, saves_output=saves_output)
        tape.release(logits)
        logits = output
    return logits


def split_logits(tape: Tape, workload: Workload, logits: Tensor) -> list[Tensor]:
    """Return views of the logits with at most ``MAX_LOGITS_PER_CHUNK`` elements each."""
    vocab_size = workload.architecture.vocab_size
    rows = max(1, MAX_LOGITS_PER_CHUNK // vocab_size)
    num_full, remainder = divmod(logits.numel // vocab_size, rows)
    sizes = [rows * vocab_size] * num_full + [remainder * vocab_size] * (remainder > 0)
    return tape.split(logits, sizes)


def cross_entropy(tape: Tape, workload: Workload, logits: Tensor) -> Tensor:
    """Return the cross-entropy: the softmax is saved.

    Above ``MAX_LOGITS_PER_CHUNK`` it is computed chunk by chunk, and recomputed in the backward pass; the
    logits are saved, and the gradients of the chunks are joined at the end.
    """
    if logits.numel <= MAX_LOGITS_PER_CHUNK:
        logits_fp32 = to_float32(tape, logits)
        log_probs = tape.apply([logits_fp32], logits_fp32.numel, 4, saves_output=True)
        loss = tape.apply([log_probs], 1, 4)
        tape.release(logits_fp32, log_probs)
        return loss
    chunks = split_logits(tape, workload, logits)
    sums = []
    for chunk in chunks:
        # The float32 softmax of one chunk is freed before the next chunk.
        tape.allocate_temporary(4 * chunk.numel, LOGITS_CATEGORY)
        sums.append(tape.apply([chunk], 1, 4, saved_for_backward=[logits], workspace=2 * 4 * chunk.numel))
    loss = tape.apply(sums, 1, 4)
    tape.release(*chunks, *sums)
    return loss


def target_logps(tape: Tape, workload: Workload, logits: Tensor) -> Tensor:
    """Return log-probabilities of the targets: a logit minus the log-sum-exp, for which the logits are saved.

    The backward pass allocates x - logsumexp and its exponential.
    """
    chunks = [logits] if logits.numel <= MAX_LOGITS_PER_CHUNK else split_logits(tape, workload, logits)
    results = []
    for chunk in chunks:
        logits_fp32 = to_float32(tape, chunk)
        target_logits = tape.apply([logits_fp32], 1, 4)
        logsumexp = tape.apply(
            [logits_fp32],
            1,
            4,
            # A chunk that needs no cast is a view: saving it keeps all logits in memory.
            saved_for_backward=[logits_fp32 if logits_fp32 is not chunk else logits],
            workspace=2 * 4 * logits_fp32.numel,
        )
        tape.allocate_temporary(4 * logits_fp32.numel, LOGITS_CATEGORY)
        results += [target_logits, logsumexp]
        tape.release(logits_fp32)
    loss = tape.apply(results, 1, 4)
    tape.release(*results, *(chunks if chunks[0] is not logits else []))
    return loss


def to_float32(tape: Tape, logits: Tensor) -> Tensor:
    """Return the logits in float32."""
    if logits.itemsize == 4:
        tape.retain(logits)
        return logits
    return tape.apply([logits], logits.numel, 4)


def consistency_loss(tape: Tape, workload: Workload, pass_losses: list[Tensor]) -> Tensor:
    """Return AdaMix's KL divergence of two passes: two softmaxes, their exponentials, both differences."""
    numel = workload.predicted * workload.architecture.vocab_size
    saved = [tape.allocate(numel, 4, LOGITS_CATEGORY) for _ in range(6)]
    loss = tape.apply(pass_losses, 1, 4, saved_for_backward=saved, workspace=2 * 4 * numel)
    tape.release(*saved)
    return loss


def score_loss(tape: Tape, workload: Workload) -> Tensor:
    """Return the loss on a float32 score head (reward, value), which saves the states in float32."""
    linears = AdaptedLinears(tape, workload)
    states = Decoder(linears).forward(embed_tokens(linears))
    linears.clear_autocast_cache()
    states_fp32 = linears.to(states, 4)
    tape.release(states)
    head = tape.parameter(max(1, workload.heads) * workload.architecture.hidden_size)
    scores = tape.apply(
        [states_fp32, head], workload.tokens * max(1, workload.heads), 4, saved_for_backward=[states_fp32]
    )
    tape.release(states_fp32)
    loss = tape.apply([scores], 1, 4)
    tape.release(scores)
    return loss
