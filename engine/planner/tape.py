"""A forward and its backward as sizes: what is kept in between, and the most that the backward holds.

Autograd's rules, without tensors: an operation keeps what its own backward needs, a storage that several keep counts
once; nodes run in the reverse order of their birth; a node holds the gradient of its results, what it kept, what it
makes and its temporaries at once, and frees the first two when it is done; where a value is used twice its gradients
are summed. A block of a model is some forty operations, so that a tape is written and run in well under a millisecond.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Held:
    """A storage: bytes, and whether somebody outside the tape holds it, so that it does not count."""

    num_bytes: int
    outside: bool = False


@dataclass(eq=False, slots=True)
class Value:
    """A result: its own bytes, as many as its gradient has; the storage it lies in; whether it needs a gradient.

    `source`: what is kept in its stead where it is made again in the backward. Then `made` bytes are there while it is
    read, itself included, and `making` more for a moment before.
    """

    num_bytes: int
    held: Held
    wanted: bool
    source: tuple[Held, ...] = ()
    made: int = 0
    making: int = 0

    @property
    def kept(self) -> tuple[Held, ...]:
        """What is kept of it for whoever reads it in the backward."""
        return self.source or (self.held,)


@dataclass(frozen=True, slots=True)
class Weight:
    """A trained weight in a backward, bytes.

    `dense`: its dense gradient. `reading`: what whoever takes the gradient has beside it at the most, what stays
    included. `staying`: what is left of it. `buffered`: whether it is made inside the layer's own function, in a buffer
    that all such layers share and that lives until the backward is over (`engine.sparse.gradient_ways.Workspace`).
    """

    dense: int
    reading: int
    staying: int
    buffered: bool = False


@dataclass(eq=False, slots=True)
class _Node:
    outputs: tuple[Value, ...]
    inputs: tuple[Value, ...]
    keeps: tuple[Held, ...]
    scratch: int
    passes: bool
    weight: Weight | None
    made: int
    making: int


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward beside what it began with, bytes.

    `rise`: the most that it added. `change`: what it added in the end, of which `staying` is left of gradients.
    `buffer`: the size of the shared buffer in the end.
    """

    rise: int
    change: int
    staying: int
    buffer: int


class Tape:
    """Operations in the order in which a forward runs them."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._nodes: list[_Node] = []
        self._kept: set[Held] = set()
        self.saved_bytes = 0
        """What lies in memory between forward and backward."""
        self.forward_peak = 0
        """The most that `reach` was told of, with what was saved by then."""

    def op(
        self,
        num_bytes: int,
        inputs: Sequence[Value],
        keeps: Sequence[Value | Held] = (),
        *,
        scratch: int = 0,
        passes: bool = False,
        keeps_result: bool = False,
        weight: Weight | None = None,
        reads: Value | None = None,
        biased: bool = False,
    ) -> Value:
        """Note an operation; return its result.

        Args:
            num_bytes: of the result.
            inputs: values that it reads and that may need a gradient.
            keeps: what its backward needs.
            scratch: temporaries of its backward.
            passes: the gradient of the result is that of each input, no new one.
            keeps_result: whether the backward needs the result.
            weight: a trained weight that it multiplies by.
            reads: a value that its backward reads, be it kept or made again.
            biased: whether it adds a trained bias, for which the gradient comes here whatever the inputs need.
        """
        wanted = biased or weight is not None or any(value.wanted for value in inputs)
        result = Value(num_bytes, Held(num_bytes), wanted)
        if wanted:
            kept = (*keeps, result) if keeps_result else keeps
            holds = tuple(each.held if isinstance(each, Value) else each for each in kept)
            made = making = 0
            if reads is not None:
                holds, made, making = (*holds, *reads.kept), reads.made, reads.making
            self._nodes.append(_Node((result,), tuple(inputs), holds, scratch, passes, weight, made, making))
            self.keep(*holds)
        return result

    def split(self, value: Value, sizes: Sequence[int]) -> tuple[Value, ...]:
        """Note views of a value, of these bytes; their gradients are joined into a new one of the whole."""
        parts = tuple(Value(size, value.held, value.wanted) for size in sizes)
        if value.wanted:
            self._nodes.append(_Node(parts, (value,), (), 0, False, None, 0, 0))
        return parts

    def keep(self, *holds: Held) -> None:
        """Count storages as saved from now on."""
        new = set(holds) - self._kept
        self._kept |= new
        self.saved_bytes += sum(held.num_bytes for held in new if not held.outside)

    def reach(self, beside: int, *values: Value) -> None:
        """Say that the forward holds `beside` bytes for a moment, and `values`, beside what is saved by now."""
        unsaved = sum(each.num_bytes for each in values if not (each.held.outside or each.held in self._kept))
        self.forward_peak = max(self.forward_peak, self.saved_bytes + beside + unsaved)

    def backward(self, result: Value, buffer: int = 0) -> Backward:
        """Return what the backward from `result` adds to what is saved and the gradient of `result`.

        Args:
            result: of the last operation.
            buffer: bytes of the shared buffer when it begins.
        """
        run = _Run(self._nodes, result, buffer)
        for node in reversed(self._nodes):
            run.node(node)
        return Backward(run.peak, run.live, run.staying, run.buffer)


class _Gradient:
    """A gradient: its bytes, and how many hold it."""

    __slots__ = ("holders", "num_bytes")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.holders = num_bytes, 0


class _Run:
    """A backward under way: bytes live beside what it began with, and the most so far."""

    def __init__(self, nodes: Sequence[_Node], result: Value, buffer: int) -> None:
        self.live = self.peak = self.staying = 0
        self.buffer = buffer
        self._keepers = Counter(held for node in nodes for held in set(node.keeps))
        self._pending: dict[Value, _Gradient] = {}
        self._hold(result, _Gradient(result.num_bytes))

    def node(self, node: _Node) -> None:
        grads = [grad for grad in (self._pending.pop(each, None) for each in node.outputs) if grad is not None]
        if not grads:
            return
        made = []
        for value in node.inputs:
            if value.wanted:
                made.append((value, grads[0] if node.passes else _Gradient(value.num_bytes)))
                self.live += 0 if node.passes else value.num_bytes
        weight, dense = node.weight, 0
        self._reach(node.made + node.making)
        if weight is not None and weight.buffered:
            # The layer's function is done with its temporaries before it takes the gradient of the weight.
            self._reach(node.scratch)
            grown = max(0, weight.dense - self.buffer)
            self.live, self.buffer = self.live + grown, self.buffer + grown
            self._reach(node.made + weight.reading)
        else:
            dense = 0 if weight is None else weight.dense
            self._reach(node.made + node.scratch + dense)
        for _, grad in made:
            grad.holders += 1
        for grad in grads:
            self._release(grad)
        for held in set(node.keeps):
            self._keepers[held] -= 1
            self.live -= held.num_bytes if not self._keepers[held] and not held.outside else 0
        for value, grad in made:
            grad.holders -= 1
            self._hold(value, grad)
        if weight is not None:
            self._reach(0 if weight.buffered else dense + weight.reading)
            self.live += weight.staying
            self.staying += weight.staying

    def _hold(self, value: Value, grad: _Gradient) -> None:
        before = self._pending.get(value)
        grad.holders += 1
        if before is not None:
            both = _Gradient(value.num_bytes)
            both.holders = 1
            self.live += both.num_bytes
            self._reach(0)
            self._release(before)
            self._release(grad)
            grad = both
        self._pending[value] = grad

    def _release(self, grad: _Gradient) -> None:
        grad.holders -= 1
        if not grad.holders:
            self.live -= grad.num_bytes

    def _reach(self, beside: int) -> None:
        self.peak = max(self.peak, self.live + beside)
