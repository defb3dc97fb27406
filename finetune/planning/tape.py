"""Autograd in bytes: operations are written down with their sizes, and the fullest moment is read off.

A tensor lives while somebody holds it: the function that made it, an operation that keeps it for its backward
pass, or a gradient that waits for more. The backward pass runs operations in the reverse order of their
writing, as PyTorch's engine does; each one makes the gradients of its inputs, and then lets go of its own
gradient and of what it kept. So the peak is that of the real step, transient tensors included, as far as the
operations are written down as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil


class Tensor:
    """Numbers of ``each`` bytes: held ``holders`` times, and with a gradient if it ``learns``.

    A view has no bytes of its own; its gradient has.
    """

    __slots__ = ("each", "grad", "holders", "learns", "numbers", "part", "size", "trained")

    def __init__(self, numbers: int, each: int, part: str, *, trained: bool = False) -> None:
        """Describe a tensor that belongs to a part of the memory; ``trained``: it is a weight."""
        self.numbers, self.each, self.part = numbers, each, part
        self.size = numbers * each
        self.learns = self.trained = trained
        self.holders = 0
        self.grad: Tensor | None = None


@dataclass(eq=False, slots=True)
class Operation:
    """What made a tensor.

    Attributes:
        made: the tensor.
        inputs: those that get a gradient.
        keeps: what the backward pass needs.
        aliased: the gradient goes through as it is (additions, views).
        workspace: bytes that the backward pass takes for a moment, beside gradients.
        again: of a checkpointed part, what computes its inside again and runs that backward.
    """

    made: Tensor
    inputs: Sequence[Tensor]
    keeps: Sequence[Tensor]
    aliased: bool = False
    workspace: int = 0
    again: "Callable[[Tensor], None] | None" = None


@dataclass
class Tape:
    """The memory of one process while it computes.

    Attributes:
        in_place: whether a second gradient of a tensor is added into the first one, as the engine does with
            plain tensors; with tensors that only have a shape it makes a third.
        live: bytes by part.
        most: the same at the fullest moment so far.
        recording: whether operations are written down for a backward pass.
        accumulating: whether gradients of weights are there already (counted elsewhere) and are added to.
        parts: into how many a gradient of a weight is cut when it is whole; one of them stays.
        trained: bytes that stay of the gradients of all weights that were spoken of so far.
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
        """Allocate a tensor; the caller holds it."""
        tensor = Tensor(numbers, each, part)
        tensor.holders = 1
        self.live[part] = self.live.get(part, 0) + tensor.size
        self.total += tensor.size
        if self.total > self.peak:
            self.peak, self.most = self.total, dict(self.live)
        return tensor

    def moment(self, size: int, part: str = "workspace") -> None:
        """Allocate some bytes and let go of them."""
        self.drop(self.new(size, 1, part))

    def drop(self, *tensors: Tensor) -> None:
        """Hold tensors once less."""
        for tensor in tensors:
            tensor.holders -= 1
            if tensor.holders == 0:
                self.live[tensor.part] -= tensor.size
                self.total -= tensor.size

    def hold(self, *tensors: Tensor) -> None:
        """Hold tensors once more."""
        for tensor in tensors:
            tensor.holders += 1

    def weight(self, numbers: int) -> Tensor:
        """Return a trained float32 weight; only its gradient is counted here."""
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
        """Write an operation down and return what it makes, held by the caller.

        Args:
            inputs: tensors that may want a gradient.
            numbers: of the result.
            each: bytes of a number of it.
            keeps: what the backward pass needs, if there is one.
            keeps_result: whether it needs the result too.
            aliased: whether the gradient goes through as it is.
            workspace: bytes of the backward pass for a moment.
            part: what the result belongs to; else what its first input does.
        """
        first = "activations" if inputs[0].trained else inputs[0].part
        made = self.new(numbers, each, part or first)
        learning = [one for one in inputs if one.learns]
        if learning and self.recording:
            kept = [*keeps, made] if keeps_result else list(keeps)
            self.hold(*(one for one in kept if not one.trained))
            self.write(Operation(made, learning, kept, aliased, workspace))
        return made

    def split(self, whole: Tensor, pieces: Sequence[int]) -> list[Tensor]:
        """Return views of a tensor that live as long as it is held; their gradients are joined to its own."""
        views = [Tensor(numbers, whole.each, whole.part) for numbers in pieces]
        for view in views:
            view.size, view.holders, view.learns = 0, 1, whole.learns

        def join(first: Tensor) -> None:
            joined = self.new(whole.numbers, whole.each, whole.part)
            self.drop(first, *(view.grad for view in views if view.grad is not None))
            self.accumulate(whole, joined)

        if whole.learns and self.recording:
            self.write(Operation(views[0], [whole], [], again=join))
        return views

    def write(self, operation: Operation) -> None:
        """Note what made a tensor."""
        operation.made.learns = True
        self.operations.append(operation)

    def backward(self, last: Tensor) -> None:
        """Run all operations backward from a tensor."""
        last.grad = self.new(last.numbers, last.each, last.part)
        self.unwind()

    def unwind(self) -> None:
        """Run all operations backward, the last one first."""
        while self.operations:
            self._undo(self.operations.pop())

    def _undo(self, operation: Operation) -> None:
        grad, operation.made.grad = operation.made.grad, None
        kept = [one for one in operation.keeps if not one.trained]
        if grad is None:
            self.drop(*kept)
        elif operation.again is not None:
            operation.again(grad)
            self.drop(*kept)
        else:
            gradients = [self._gradient(one, grad, aliased=operation.aliased) for one in operation.inputs]
            if operation.workspace:
                self.moment(operation.workspace)
            self.drop(*kept, grad)
            for one, own in zip(operation.inputs, gradients, strict=True):
                self.accumulate(one, own)

    def _gradient(self, tensor: Tensor, grad: Tensor, *, aliased: bool) -> Tensor:
        if aliased and not tensor.trained:
            self.hold(grad)
            return grad
        return self.new(tensor.numbers, tensor.each, tensor.part)

    def accumulate(self, tensor: Tensor, grad: Tensor) -> None:
        """Add a gradient to what a tensor has of it."""
        waiting = tensor.grad
        if waiting is None and tensor.trained and self.parts > 1 and not self.accumulating:
            tensor.grad = self.new(ceil(grad.size / self.parts), 1, grad.part)
            self.drop(grad)
        elif waiting is None and not (tensor.trained and self.accumulating):
            tensor.grad = grad
        elif waiting is None or (self.in_place and (tensor.trained or waiting.holders == 1)):
            self.drop(grad)
        else:
            tensor.grad = self.new(waiting.numbers, waiting.each, waiting.part)
            self.drop(waiting, grad)
