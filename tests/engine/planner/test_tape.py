"""Tapes on graphs whose bytes are counted by hand."""

from engine.planner.tape import Held, Tape, Value, Weight


def _input(num_bytes: int) -> Value:
    return Value(num_bytes, Held(num_bytes), wanted=True)


def test_a_storage_that_two_operations_keep_counts_once() -> None:
    tape, x = Tape(), _input(10)
    tape.op(10, [tape.op(10, [x], [x])], [x, Held(3)])
    assert tape.saved_bytes == 13


def test_what_needs_no_gradient_is_not_kept() -> None:
    tape, x = Tape(), Value(10, Held(10), wanted=False)
    y = tape.op(10, [x], [x])
    assert (tape.saved_bytes, y.wanted) == (0, False)


def test_a_backward_holds_old_and_new_gradient_and_frees_what_was_kept() -> None:
    tape, x = Tape(), _input(10)
    backward = tape.backward(tape.op(6, [x], [x], scratch=5))
    assert (backward.rise, backward.change) == (10 + 5, 10 - 6 - 10)  # new and scratch; kept x and old gradient go


def test_two_gradients_of_one_value_are_summed_into_a_third() -> None:
    tape, x = Tape(), _input(10)
    y = tape.op(10, [tape.op(10, [x]), x], passes=True)
    backward = tape.backward(y)
    # The gradient of the sum, which both share, and that of the first use, and their sum.
    assert (backward.rise, backward.change) == (20, 0)


def test_a_dense_gradient_goes_and_its_entries_stay() -> None:
    tape, x = Tape(), _input(10)
    backward = tape.backward(tape.op(10, [x], [x], weight=Weight(dense=100, reading=7, staying=2)))
    # Old gradient and x are gone when the dense gradient is read.
    assert (backward.rise, backward.change, backward.staying) == (110, -10 + 2, 2)


def test_layers_share_the_buffer_of_their_dense_gradients() -> None:
    tape, x = Tape(), _input(10)
    y = tape.op(10, [x], [x], weight=Weight(40, 0, 0, buffered=True))
    backward = tape.backward(tape.op(10, [y], [y], weight=Weight(100, 0, 0, buffered=True)))
    assert (backward.buffer, backward.change) == (100, 100 - 20)
    assert tape.backward(y, buffer=100).rise == 10
