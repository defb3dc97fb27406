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


class Buffer:
    """A simulated tensor: element count, bytes per element, category, reference count and gradient.

    A view has ``nbytes`` 0; its gradient is a buffer of its own.
    """

    __slots__ = (
        "itemsize",
        "grad",
        "refcount",
        "requires_grad",
        "numel",
        "category",
        "nbytes",
        "is_parameter",
    )

    def __init__(self, numel: int, itemsize: int, category: str, *, is_parameter: bool = False) -> None:
        self.numel, self.itemsize, self.category = numel, itemsize, category
        self.nbytes = numel * itemsize
        self.requires_grad = self.is_parameter = is_parameter
        self.refcount = 0
        self.grad: Buffer | None = None


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

    output: Buffer
    inputs: Sequence[Buffer]
    saved_for_backward: Sequence[Buffer]
    aliased: bool = False
    workspace: int = 0
    backward_fn: "Callable[[Buffer], None] | None" = None


@dataclass
class Tape:
    """Memory of one process during a forward and backward pass.

    Attributes:
        in_place: whether a second gradient is accumulated into the first one, as the engine does with plain
            tensors; False: their sum is a new buffer, as with fake tensors, and both are freed after it.
        live_by_category: live bytes.
        peak_by_category: live bytes at the peak so far.
        total: live bytes of all categories; peak: their maximum so far.
        recording: whether operations are recorded for a backward pass (False: no_grad).
        accumulating: whether weight gradients exist already (counted elsewhere) and are accumulated into.
        grad_shards: the number of shards that a full weight gradient is reduce-scattered into; one stays
            here.
        weight_grad_bytes: bytes that remain of the gradients of all weights seen so far.
    """

    in_place: bool = True
    live_by_category: dict[str, int] = field(default_factory=dict)
    peak_by_category: dict[str, int] = field(default_factory=dict)
    total: int = 0
    peak: int = 0
    recording: bool = True
    accumulating: bool = False
    grad_shards: int = 1
    weight_grad_bytes: int = 0
    operations: list[Operation] = field(default_factory=list)

    def allocate(self, numel: int, itemsize: int, category: str = "activations") -> Buffer:
        """Allocate a buffer that the caller holds."""
        buffer = Buffer(numel, itemsize, category)
        buffer.refcount = 1
        self.live_by_category[category] = self.live_by_category.get(category, 0) + buffer.nbytes
        self.total += buffer.nbytes
        # Only an allocation can raise the peak, so it is recorded here.
        if self.total > self.peak:
            self.peak, self.peak_by_category = self.total, dict(self.live_by_category)
        return buffer

    def allocate_temporary(self, nbytes: int, category: str = "workspace") -> None:
        """Allocate a temporary buffer and release it, so that it counts for the peak alone."""
        self.release(self.allocate(nbytes, 1, category))

    def release(self, *buffers: Buffer) -> None:
        """Decrement reference counts, and free buffers that reach zero."""
        for buffer in buffers:
            buffer.refcount -= 1
            if buffer.refcount == 0:
                self.live_by_category[buffer.category] -= buffer.nbytes
                self.total -= buffer.nbytes

    def retain(self, *buffers: Buffer) -> None:
        """Increment reference counts."""
        for buffer in buffers:
            buffer.refcount += 1

    def weight(self, numel: int) -> Buffer:
        """Return a trainable float32 weight; only its gradient is counted here."""
        self.weight_grad_bytes += ceil(4 * numel / self.grad_shards)
        return Buffer(numel, 4, "gradients", is_parameter=True)

    def apply(
        self,
        inputs: Sequence[Buffer],
        numel: int,
        itemsize: int,
        *,
        saved_for_backward: Sequence[Buffer] = (),
        saves_output: bool = False,
        aliased: bool = False,
        workspace: int = 0,
        category: str = "",
    ) -> Buffer:
        """Record an operation and return its output, which the caller holds.

        Args:
            inputs: buffers that may require a gradient.
            numel: elements of the output.
            itemsize: bytes per element of the output.
            saved_for_backward: the buffers that the backward pass reads, if there is one.
            saves_output: whether the backward pass reads the output too.
            aliased: whether the gradient is passed through unchanged.
            workspace: temporary bytes of the backward pass.
            category: memory category of the output; default: that of the first input, activations if it is
                a weight.
        """
        # A weight's category is that of its gradient; what is computed from it is an activation.
        input_category = "activations" if inputs[0].is_parameter else inputs[0].category
        output = self.allocate(numel, itemsize, category or input_category)
        needing_grad = [buffer for buffer in inputs if buffer.requires_grad]
        # As in autograd: an operation without inputs that require a gradient saves nothing.
        if needing_grad and self.recording:
            saved = [*saved_for_backward, output] if saves_output else list(saved_for_backward)
            # Weights live for the whole run and are counted in static memory, so they are not retained here.
            self.retain(*(buffer for buffer in saved if not buffer.is_parameter))
            self.record(Operation(output, needing_grad, saved, aliased, workspace))
        return output

    def split(self, source: Buffer, numels: Sequence[int]) -> list[Buffer]:
        """Return views of a buffer; their gradients are joined into one of the buffer's size."""
        views = [Buffer(numel, source.itemsize, source.category) for numel in numels]
        for view in views:  # a view shares the storage
            view.nbytes, view.refcount, view.requires_grad = 0, 1, source.requires_grad

        def join(first_grad: Buffer) -> None:
            source_grad = self.allocate(source.numel, source.itemsize, source.category)
            self.release(first_grad, *(view.grad for view in views if view.grad is not None))
            self.accumulate_grad(source, source_grad)

        # The views' readers are recorded later and so run backward earlier: their gradients exist by then.
        if source.requires_grad and self.recording:
            self.record(Operation(views[0], [source], [], backward_fn=join))
        return views

    def record(self, operation: Operation) -> None:
        """Append an operation to the tape."""
        operation.output.requires_grad = True
        self.operations.append(operation)

    def backward(self, output: Buffer) -> None:
        """Run the backward pass from an output."""
        output.grad = self.allocate(output.numel, output.itemsize, output.category)
        self.run_backward()

    def run_backward(self) -> None:
        """Run the backward pass of all recorded operations, last one first."""
        while self.operations:
            self._backward_operation(self.operations.pop())

    def _backward_operation(self, operation: Operation) -> None:
        grad, operation.output.grad = operation.output.grad, None
        saved = [buffer for buffer in operation.saved_for_backward if not buffer.is_parameter]
        if grad is None:  # the output is not part of the loss
            self.release(*saved)
        elif operation.backward_fn is not None:
            operation.backward_fn(grad)
            self.release(*saved)
        else:
            # Autograd allocates all input gradients before it frees the output's gradient and the saved
            # buffers.
            input_grads = [
                self._input_grad(buffer, grad, aliased=operation.aliased) for buffer in operation.inputs
            ]
            if operation.workspace:
                self.allocate_temporary(operation.workspace)
            self.release(*saved, grad)
            for buffer, input_grad in zip(operation.inputs, input_grads, strict=True):
                self.accumulate_grad(buffer, input_grad)

    def _input_grad(self, buffer: Buffer, grad: Buffer, *, aliased: bool) -> Buffer:
        # A weight's gradient is a buffer of its own: it outlives the pass.
        if aliased and not buffer.is_parameter:
            self.retain(grad)
            return grad
        return self.allocate(buffer.numel, buffer.itemsize, buffer.category)

    def accumulate_grad(self, buffer: Buffer, grad: Buffer) -> None:
        """Accumulate a gradient into a buffer's ``grad``."""
        existing_grad = buffer.grad
        # ZeRO-2 and ZeRO-3 reduce-scatter a full gradient as soon as it is there.
        if existing_grad is None and buffer.is_parameter and self.grad_shards > 1 and not self.accumulating:
            buffer.grad = self.allocate(ceil(grad.nbytes / self.grad_shards), 1, grad.category)
            self.release(grad)
        elif existing_grad is None and not (buffer.is_parameter and self.accumulating):
            buffer.grad = grad
        # In place only where no other operation holds the existing gradient (an aliased one is shared).
        elif existing_grad is None or (
            self.in_place and (buffer.is_parameter or existing_grad.refcount == 1)
        ):
            self.release(grad)
        else:
            buffer.grad = self.allocate(existing_grad.numel, existing_grad.itemsize, existing_grad.category)
            self.release(existing_grad, grad)
