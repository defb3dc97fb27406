"""Autograd memory simulator: a tape of operations with buffer sizes, replayed backward for the peak memory.

A buffer is freed when nothing holds it: the function that allocated it, an operation that saved it for
backward, or a gradient that is still accumulating. The backward pass visits operations in reverse order, as
PyTorch's engine does: each one allocates the gradients of its inputs, then releases its own gradient and its
saved buffers. The peak includes temporaries, and equals that of the real step as far as the recorded
operations match it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil


class Tensor:
    """Size of one tensor: element count, bytes per element, category, reference count and gradient.

    A view has ``nbytes`` 0; its gradient is a buffer of its own.
    """

    __slots__ = ("each", "grad", "holders", "learns", "numbers", "part", "size", "trained")

    def __init__(self, numbers: int, each: int, part: str, *, trained: bool = False) -> None:
        self.numbers, self.each, self.part = numbers, each, part
        self.size = numbers * each
        self.learns = self.trained = trained
        self.holders = 0
        self.grad: Tensor | None = None


@dataclass(eq=False, slots=True)
class Operation:
    """One recorded operation.

    Attributes:
        output: the buffer it returns.
        inputs: the inputs that require a gradient.
        saved_for_backward: the buffers that its backward pass reads.
        aliased: whether the gradient is passed through unchanged (additions, views).
        workspace: temporary bytes of the backward pass, in addition to gradients.
        backward_fn: replaces the default backward (recomputation under checkpointing, joins of views).
    """

    made: Tensor
    inputs: Sequence[Tensor]
    keeps: Sequence[Tensor]
    aliased: bool = False
    workspace: int = 0
    again: "Callable[[Tensor], None] | None" = None


@dataclass
class Tape:
    """Memory of one process during a forward and backward pass.

    Attributes:
        in_place: whether a second gradient is accumulated into the first one, as the engine does with plain
            tensors; fake tensors (a shape, no data) make it allocate a third.
        live_by_category: live bytes.
        peak_by_category: live bytes at the peak so far.
        recording: whether operations are recorded for a backward pass (False: no_grad).
        accumulating: whether weight gradients exist already (counted elsewhere) and are accumulated into.
        grad_shards: the number of shards that a full weight gradient is reduce-scattered into; one stays
            here.
        weight_grad_bytes: bytes that remain of the gradients of all weights seen so far.
    """

    in_place: bool = True
    live: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    total: int = 0
    peak: int = 0
    recording: bool = True
    accumulating: bool = False
    parts: int = 1
    trained: int = 0
    operations: list[Operation] = field(default_factory=list)

    def new(self, numbers: int, each: int, part: str = "activations") -> Tensor:
        """Allocate a buffer that the caller holds."""
        tensor = Tensor(numbers, each, part)
        tensor.holders = 1
        self.live[part] = self.live.get(part, 0) + tensor.size
        self.total += tensor.size
        # Only an allocation can raise the peak, so it is recorded here.
        if self.total > self.peak:
            self.peak, self.most = self.total, dict(self.live)
        return tensor

    def moment(self, size: int, part: str = "workspace") -> None:
        """Allocate a temporary buffer and release it, so that it counts for the peak alone."""
        self.drop(self.new(size, 1, part))

    def drop(self, *tensors: Tensor) -> None:
        """Decrement reference counts, and free buffers that reach zero."""
        for tensor in tensors:
            tensor.holders -= 1
            if tensor.holders == 0:
                self.live[tensor.part] -= tensor.size
                self.total -= tensor.size

    def hold(self, *tensors: Tensor) -> None:
        """Increment reference counts."""
        for tensor in tensors:
            tensor.holders += 1

    def weight(self, numbers: int) -> Tensor:
        """Return a trainable float32 weight; only its gradient is counted here."""
        self.trained += ceil(4 * numbers / self.parts)
        return Tensor(numbers, 4, "gradients", trained=True)

    def run(
        self,
        inputs: Sequence[Tensor],
        numbers: int,
        each: int,
        *,
        keeps: Sequence[Tensor] = (),
        keeps_result: bool = False,
        aliased: bool = False,
        workspace: int = 0,
        part: str = "",
    ) -> Tensor:
        """Record an operation and return its output, which the caller holds.

        Args:
            inputs: buffers that may require a gradient.
            numel: elements of the output.
            itemsize: bytes per element of the output.
            saved_for_backward: the buffers that the backward pass reads, if there is one.
            saves_output: whether the backward pass reads the output too.
            aliased: whether the gradient is passed through unchanged.
            workspace: temporary bytes of the backward pass.
            category: memory category of the output; default: that of the first input.
        """
        # A weight's category is that of its gradient; what is computed from it is an activation.
        first = "activations" if inputs[0].trained else inputs[0].part
        made = self.new(numbers, each, part or first)
        learning = [one for one in inputs if one.learns]
        # As in autograd: an operation without inputs that require a gradient saves nothing.
        if learning and self.recording:
            kept = [*keeps, made] if keeps_result else list(keeps)
            # Weights live for the whole run and are counted in static memory, so they are not retained here.
            self.hold(*(one for one in kept if not one.trained))
            self.write(Operation(made, learning, kept, aliased, workspace))
        return made

    def split(self, whole: Tensor, pieces: Sequence[int]) -> list[Tensor]:
        """Return views of a buffer; their gradients are joined into one of the buffer's size."""
        views = [Tensor(numbers, whole.each, whole.part) for numbers in pieces]
        for view in views:  # a view shares the storage
            view.size, view.holders, view.learns = 0, 1, whole.learns

        def join(first: Tensor) -> None:
            joined = self.new(whole.numbers, whole.each, whole.part)
            self.drop(first, *(view.grad for view in views if view.grad is not None))
            self.accumulate(whole, joined)

        # The views' readers are recorded later and so run backward earlier: their gradients exist by then.
        if whole.learns and self.recording:
            self.write(Operation(views[0], [whole], [], again=join))
        return views

    def write(self, operation: Operation) -> None:
        """Append an operation to the tape."""
        operation.made.learns = True
        self.operations.append(operation)

    def backward(self, last: Tensor) -> None:
        """Run the backward pass from an output."""
        last.grad = self.new(last.numbers, last.each, last.part)
        self.unwind()

    def unwind(self) -> None:
        """Run the backward pass of all recorded operations, last one first."""
        while self.operations:
            self._undo(self.operations.pop())

    def _undo(self, operation: Operation) -> None:
        grad, operation.made.grad = operation.made.grad, None
        kept = [one for one in operation.keeps if not one.trained]
        if grad is None:  # the output is not part of the loss
            self.drop(*kept)
        elif operation.again is not None:
            operation.again(grad)
            self.drop(*kept)
        else:
            # Autograd allocates all input gradients before it frees the output's gradient and the saved
            # buffers.
            gradients = [self._gradient(one, grad, aliased=operation.aliased) for one in operation.inputs]
            if operation.workspace:
                self.moment(operation.workspace)
            self.drop(*kept, grad)
            for one, own in zip(operation.inputs, gradients, strict=True):
                self.accumulate(one, own)

    def _gradient(self, tensor: Tensor, grad: Tensor, *, aliased: bool) -> Tensor:
        # A weight's gradient is a buffer of its own: it outlives the pass.
        if aliased and not tensor.trained:
            self.hold(grad)
            return grad
        return self.new(tensor.numbers, tensor.each, tensor.part)

    def accumulate(self, tensor: Tensor, grad: Tensor) -> None:
        """Accumulate a gradient into a buffer's ``grad``."""
        waiting = tensor.grad
        # ZeRO-2 and ZeRO-3 reduce-scatter a full gradient as soon as it is there.
        if waiting is None and tensor.trained and self.parts > 1 and not self.accumulating:
            tensor.grad = self.new(ceil(grad.size / self.parts), 1, grad.part)
            self.drop(grad)
        elif waiting is None and not (tensor.trained and self.accumulating):
            tensor.grad = grad
        # In place only where no other operation holds the existing gradient (an aliased one is shared).
        elif waiting is None or (self.in_place and (tensor.trained or waiting.holders == 1)):
            self.drop(grad)
        else:
            tensor.grad = self.new(waiting.numbers, waiting.each, waiting.part)
            self.drop(waiting, grad)
