"""Autograd memory simulation on graphs small enough to count by hand."""

from finetune.planning.tape import Tape, Tensor


def learning(tape: Tape, numbers: int) -> Tensor:
    """Return an input buffer that requires a gradient."""
    tensor = tape.new(numbers, 1)
    tensor.learns = True
    return tensor


def test_what_nobody_holds_is_gone() -> None:
    tape = Tape()
    first = tape.new(10, 4)
    tape.drop(tape.new(5, 4))
    assert (tape.total, tape.peak) == (40, 60)
    tape.drop(first)
    assert (tape.total, tape.peak) == (0, 60)


def test_kept_tensors_live_until_their_backward_pass() -> None:
    """x (8) -> a (8, saves x) -> b (8, saves a): forward 24; backward: the gradient of b, then that of a."""
    tape = Tape()
    x = learning(tape, 8)
    a = tape.run([x], 8, 1, keeps=[x])
    b = tape.run([a], 8, 1, keeps=[a])
    tape.drop(x, a)
    assert tape.total == 24
    tape.drop(b)
    tape.backward(b)
    # x and a are saved (16), and the gradients of b and of a coexist (16).
    assert tape.peak == 32
    assert tape.total == 8  # the gradient of x stays with its owner


def test_without_anything_to_learn_nothing_is_kept() -> None:
    tape = Tape()
    x = tape.new(8, 1)
    made = tape.run([x], 8, 1, keeps=[x])
    tape.drop(x)
    assert tape.total == 8 and not made.learns and not tape.operations


def test_without_recording_nothing_is_kept() -> None:
    tape = Tape(recording=False)
    x = learning(tape, 8)
    tape.run([x], 8, 1, keeps=[x])
    tape.drop(x)
    assert tape.total == 8


def test_sums_hand_one_gradient_to_both_terms() -> None:
    tape = Tape()
    x, y = learning(tape, 8), learning(tape, 8)
    made = tape.run([x, y], 8, 1, aliased=True)
    tape.drop(x, y, made)
    tape.backward(made)
    assert tape.total == 8 and x.grad is y.grad


def test_a_second_gradient_is_added_to_the_first() -> None:
    """x is read twice: plain tensors accumulate in place (8 + 8), fake ones allocate a third (8 + 8 + 8)."""
    peaks = []
    for in_place in (True, False):
        tape = Tape(in_place=in_place)
        x = learning(tape, 8)
        a, b = tape.run([x], 8, 1), tape.run([x], 8, 1)
        made = tape.run([a, b], 0, 1)
        tape.drop(x, a, b, made)
        tape.backward(made)
        assert tape.total == 8
        peaks.append(tape.peak)
    assert peaks == [24, 24]  # forward x, a, b; in the backward pass 8 + 8, and 8 + 8 + 8


def test_gradients_of_weights_stay_unless_they_are_there_already() -> None:
    for accumulating, left in ((False, 40), (True, 0)):
        tape = Tape(accumulating=accumulating)
        made = tape.run([tape.weight(10)], 8, 1)
        tape.drop(made)
        tape.backward(made)
        assert (tape.total, tape.live["gradients"]) == (left, left)
        assert tape.trained == 40


def test_views_take_no_memory_and_join_their_gradients() -> None:
    tape = Tape()
    whole = learning(tape, 12)
    parts = tape.split(whole, [4, 8])
    assert tape.total == 12
    made = tape.run(parts, 1, 1)
    tape.drop(*parts, whole, made)
    tape.backward(made)
    assert tape.total == 12  # the gradient of the source
    assert tape.peak == 24  # with those of its views


def test_the_fullest_moment_is_told_by_part() -> None:
    tape = Tape()
    tape.drop(tape.new(10, 1, "logits and loss"))
    kept = tape.new(4, 1)
    tape.moment(7)
    tape.drop(kept)
    assert tape.peak == 11
    assert {part: size for part, size in tape.most.items() if size} == {"activations": 4, "workspace": 7}
