"""Autograd memory simulation on graphs small enough to count by hand."""

from finetune.planner.tape import Tape, Tensor


def input_buffer(tape: Tape, numel: int) -> Tensor:
    """Return an input tensor that requires a gradient."""
    tensor = tape.allocate(numel, 1)
    tensor.requires_grad = True
    return tensor


def test_released_buffers_are_freed() -> None:
    tape = Tape()
    first = tape.allocate(10, 4)
    tape.release(tape.allocate(5, 4))
    assert (tape.total, tape.peak) == (40, 60)
    tape.release(first)
    assert (tape.total, tape.peak) == (0, 60)


def test_saved_buffers_live_until_their_backward_pass() -> None:
    """x (8) -> a (8, saves x) -> b (8, saves a): forward 24; backward: the gradient of b, then that of a."""
    tape = Tape()
    x = input_buffer(tape, 8)
    a = tape.apply([x], 8, 1, saved_for_backward=[x])
    b = tape.apply([a], 8, 1, saved_for_backward=[a])
    tape.release(x, a)
    assert tape.total == 24
    tape.release(b)
    tape.backward(b)
    # x and a are saved (16), and the gradients of b and of a coexist (16).
    assert tape.peak == 32
    assert tape.total == 8  # the gradient of x stays with its owner


def test_without_requires_grad_nothing_is_saved() -> None:
    tape = Tape()
    x = tape.allocate(8, 1)
    output = tape.apply([x], 8, 1, saved_for_backward=[x])
    tape.release(x)
    assert tape.total == 8 and not output.requires_grad and not tape.operations


def test_under_no_grad_nothing_is_saved() -> None:
    tape = Tape(grad_enabled=False)
    x = input_buffer(tape, 8)
    tape.apply([x], 8, 1, saved_for_backward=[x])
    tape.release(x)
    assert tape.total == 8


def test_sums_pass_one_gradient_to_both_terms() -> None:
    tape = Tape()
    x, y = input_buffer(tape, 8), input_buffer(tape, 8)
    output = tape.apply([x, y], 8, 1, aliased=True)
    tape.release(x, y, output)
    tape.backward(output)
    assert tape.total == 8 and x.grad is y.grad


def test_a_second_gradient_is_accumulated() -> None:
    """x is read twice: plain tensors accumulate in place (8 + 8), fake ones allocate a third (8 + 8 + 8)."""
    peaks = []
    for in_place in (True, False):
        tape = Tape(in_place=in_place)
        x = input_buffer(tape, 8)
        a, b = tape.apply([x], 8, 1), tape.apply([x], 8, 1)
        output = tape.apply([a, b], 0, 1)
        tape.release(x, a, b, output)
        tape.backward(output)
        assert tape.total == 8
        peaks.append(tape.peak)
    assert peaks == [24, 24]  # forward x, a, b; in the backward pass 8 + 8, and 8 + 8 + 8


def test_weight_gradients_stay_or_accumulate() -> None:
    for accumulating, remaining in ((False, 40), (True, 0)):
        tape = Tape(accumulating=accumulating)
        output = tape.apply([tape.parameter(10)], 8, 1)
        tape.release(output)
        tape.backward(output)
        assert (tape.total, tape.live_by_category["gradients"]) == (remaining, remaining)
        assert tape.param_grad_bytes == 40


def test_views_take_no_memory_and_join_gradients() -> None:
    tape = Tape()
    source = input_buffer(tape, 12)
    views = tape.split(source, [4, 8])
    assert tape.total == 12
    output = tape.apply(views, 1, 1)
    tape.release(*views, source, output)
    tape.backward(output)
    assert tape.total == 12  # the gradient of the source
    assert tape.peak == 24  # with those of its views


def test_peak_is_reported_by_category() -> None:
    tape = Tape()
    tape.release(tape.allocate(10, 1, "logits and loss"))
    tensor = tape.allocate(4, 1)
    tape.allocate_temporary(7)
    tape.release(tensor)
    assert tape.peak == 11
    assert {category: nbytes for category, nbytes in tape.peak_by_category.items() if nbytes} == {
        "activations": 4,
        "workspace": 7,
    }
