"""Autograd memory simulator: a tape of operations on tensor sizes, replayed backward for the peak memory.

A tensor is freed when nothing holds it: the function that allocated it, an operation that saved it for
backward, or a gradient that is still accumulating. The backward pass visits operations in reverse order, as
PyTorch's engine does: each one allocates the gradients of its inputs, then releases its own gradient and its
saved tensors. The peak includes temporaries, and equals that of the real step as far as the recorded
operations match it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil


class Tensor:
    """A simulated tensor: element count, bytes per element, category, reference count and gradient.

    A view has ``nbytes`` 0; its gradient is a tensor of its own.
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
        self.grad: Tensor | None = None


@dataclass(eq=False, slots=True)
class Operation:
    """One recorded operation.

    Attributes:
        output: the tensor it returns.
        inputs: the inputs that require a gradient.
        saved_for_backward: the tensors that its backward pass reads.
        aliased: whether the gradient is passed through unchanged (additions, views).
        workspace: temporary bytes of the backward pass, in addition to gradients.
        backward_fn: replaces the default backward (recomputation under checkpointing, joins of views).
    """

    output: Tensor
    inputs: Sequence[Tensor]
    saved_for_backward: Sequence[Tensor]
    aliased: bool = False
    workspace: int = 0
    backward_fn: "Callable[[Tensor], None] | None" = None


@dataclass
class Tape:
    """Memory of one process during a forward and backward pass.

    Attributes:
        in_place: whether a second gradient is accumulated into the first one, as the engine does with plain
            tensors; False: their sum is a new tensor, as with fake tensors, and both are freed after it.
        live_by_category: live bytes.
        peak_by_category: live bytes at the peak so far.
        total: live bytes of all categories; peak: their maximum so far.
        grad_enabled: whether operations are recorded for a backward pass (False: no_grad).
        accumulating: whether weight gradients exist already (counted elsewhere) and are accumulated into.
        grad_shards: the number of shards that a full weight gradient is reduce-scattered into; one stays
            here.
        param_grad_bytes: bytes that remain of the gradients of all weights seen so far.
    """

    in_place: bool = True
    live_by_category: dict[str, int] = field(default_factory=dict)
    peak_by_category: dict[str, int] = field(default_factory=dict)
    total: int = 0
    peak: int = 0
    grad_enabled: bool = True
    accumulating: bool = False
    grad_shards: int = 1
    param_grad_bytes: int = 0
    operations: list[Operation] = field(default_factory=list)

    def allocate(self, numel: int, itemsize: int, category: str = "activations") -> Tensor:
        """Allocate a tensor that the caller holds."""
        tensor = Tensor(numel, itemsize, category)
        tensor.refcount = 1
        self.live_by_category[category] = self.live_by_category.get(category, 0) + tensor.nbytes
        self.total += tensor.nbytes
        # Only an allocation can raise the peak, so it is recorded here.
        if self.total > self.peak:
            self.peak, self.peak_by_category = self.total, dict(self.live_by_category)
        return tensor

    def allocate_temporary(self, nbytes: int, category: str = "workspace") -> None:
        """Allocate a temporary tensor and release it, so that it counts for the peak alone."""
        self.release(self.allocate(nbytes, 1, category))

    def release(self, *tensors: Tensor) -> None:
        """Decrement reference counts, and free tensors that reach zero."""
        for tensor in tensors:
            tensor.refcount -= 1
            if tensor.refcount == 0:
                self.live_by_category[tensor.category] -= tensor.nbytes
                self.total -= tensor.nbytes

    def retain(self, *tensors: Tensor) -> None:
        """Increment reference counts."""
        for tensor in tensors:
            tensor.refcount += 1

    def parameter(self, numel: int) -> Tensor:
        """Return a trainable float32 weight; only its gradient is counted here."""
        self.param_grad_bytes += ceil(4 * numel / self.grad_shards)
        return Tensor(numel, 4, "gradients", is_parameter=True)

    def apply(
        self,
        inputs: Sequence[Tensor],
        numel: int,
        itemsize: int,
        *,
        saved_for_backward: Sequence[Tensor] = (),
        saves_output: bool = False,
        aliased: bool = False,
        workspace: int = 0,
        category: str = "",
    ) -> Tensor:
        """Record an operation and return its output, which the caller holds.

        Args:
            inputs: tensors that may require a gradient.
            numel: elements of the output.
            itemsize: bytes per element of the output.
            saved_for_backward: the tensors that the backward pass reads, if there is one.
            saves_output: whether the backward pass reads the output too.
            aliased: whether the gradient is passed through unchanged.
            workspace: temporary bytes of the backward pass.
            category: memory category of the output; default: that of the first input, activations if it is
                a weight.
        """
        # A weight's category is that of its gradient; what is computed from it is an activation.
        input_category = "activations" if inputs[0].is_parameter else inputs[0].category
        output = self.allocate(numel, itemsize, category or input_category)
        needing_grad = [tensor for tensor in inputs if tensor.requires_grad]
        # As in autograd: an operation without inputs that require a gradient saves nothing.
        if needing_grad and self.grad_enabled:
            saved = [*saved_for_backward, output] if saves_output else list(saved_for_backward)
            # Weights live for the whole run and are counted in static memory, so they are not retained here.
            self.retain(*(tensor for tensor in saved if not tensor.is_parameter))
            self.record(Operation(output, needing_grad, saved, aliased, workspace))
        return output

    def split(self, source: Tensor, numels: Sequence[int]) -> list[Tensor]:
        """Return views of a tensor; their gradients are joined into one of the tensor's size."""
        views = [Tensor(numel, source.itemsize, source.category) for numel in numels]
        for view in views:  # a view shares the storage
            view.nbytes, view.refcount, view.requires_grad = 0, 1, source.requires_grad

        def join(first_grad: Tensor) -> None:
            source_grad = self.allocate(source.numel, source.itemsize, source.category)
            self.release(first_grad, *(view.grad for view in views if view.grad is not None))
            self.accumulate_grad(source, source_grad)

        # The views' readers are recorded later and so run backward earlier: their gradients exist by then.
        if source.requires_grad and self.grad_enabled:
            self.record(Operation(views[0], [source], [], backward_fn=join))
        return views

    def record(self, operation: Operation) -> None:
        """Append an operation to the tape."""
        operation.output.requires_grad = True
        self.operations.append(operation)

    def backward(self, output: Tensor) -> None:
        """Run the backward pass from an output."""
        output.grad = self.allocate(output.numel, output.itemsize, output.category)
        self.run_backward()

    def run_backward(self) -> None:
        """Run the backward pass of all recorded operations, last one first."""
        while self.operations:
            self._backward_operation(self.operations.pop())

    def _backward_operation(self, operation: Operation) -> None:
        grad, operation.output.grad = operation.output.grad, None
        saved = [tensor for tensor in operation.saved_for_backward if not tensor.is_parameter]
        if grad is None:  # the output is not part of the loss
            self.release(*saved)
        elif operation.backward_fn is not None:
            operation.backward_fn(grad)
            self.release(*saved)
        else:
            # Autograd allocates all input gradients before it frees the output's gradient and the saved
            # tensors.
            input_grads = [
                self._input_grad(tensor, grad, aliased=operation.aliased) for tensor in operation.inputs
            ]
            if operation.workspace:
                self.allocate_temporary(operation.workspace)
            self.release(*saved, grad)
            for tensor, input_grad in zip(operation.inputs, input_grads, strict=True):
                self.accumulate_grad(tensor, input_grad)

    def _input_grad(self, tensor: Tensor, grad: Tensor, *, aliased: bool) -> Tensor:
        # A weight's gradient is a tensor of its own: it outlives the pass.
        if aliased and not tensor.is_parameter:
            self.retain(grad)
            return grad
        return self.allocate(tensor.numel, tensor.itemsize, tensor.category)

    def accumulate_grad(self, tensor: Tensor, grad: Tensor) -> None:
        """Accumulate a gradient into a tensor's ``grad``."""
        existing_grad = tensor.grad
        # ZeRO-2 and ZeRO-3 reduce-scatter a full gradient as soon as it is there.
        if existing_grad is None and tensor.is_parameter and self.grad_shards > 1 and not self.accumulating:
            tensor.grad = self.allocate(ceil(grad.nbytes / self.grad_shards), 1, grad.category)
            self.release(grad)
        elif existing_grad is None and not (tensor.is_parameter and self.accumulating):
            tensor.grad = grad
        # In place only where no other operation holds the existing gradient (an aliased one is shared).
        elif existing_grad is None or (
            self.in_place and (tensor.is_parameter or existing_grad.refcount == 1)
        ):
            self.release(grad)
        else:
            tensor.grad = self.allocate(existing_grad.numel, existing_grad.itemsize, existing_grad.category)
            self.release(existing_grad, grad)
