"""One backward from the loss to the embedding: what lies in memory at each stretch of the model, block by block.

The stretches are written as tapes (`blocks.py`), like blocks once; here their figures are added up in the order of the
backward, while the gradients of what is trained come up and activations go.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby

from engine.planner import activations, output_layer
from engine.planner.blocks import Segment, block_segment, head_segment
from engine.planner.encoders import is_pooler
from engine.planner.formulas import FP32_BYTES, INT64_BYTES
from engine.planner.label_head import head_gradient, label_segment
from engine.planner.layouts import is_embedding, is_last_norm
from engine.planner.operations import LinearWeight
from engine.planner.recompute import Kept
from engine.planner.tape import Weight
from engine.planner.weights import Basis, Taking, taken_by
from engine.planner.workload import Workload


@dataclass(frozen=True)
class Moment:
    """A moment that may be the peak: what is saved for the backward and what comes and goes, in bytes.

    `without`: what is not there yet of the resident parts, in bytes by part.
    """

    phase: str
    saved: int
    transient: int
    without: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes beyond the resident terms."""
        return self.saved + self.transient - sum(self.without.values())


@lru_cache(maxsize=4)
def pass_of(work: Workload, taking: Taking) -> "Pass":
    """Return a pass, the same for those who ask one after the other."""
    return Pass(work, taking)


@dataclass(frozen=True)
class _Run:
    """Blocks that are alike and follow one another in the backward.

    `count`: of them; `segment`: each. `kept`: what one keeps between forward and backward. `left`: what it leaves of
    gradients. `again`: whether it is computed anew.
    """

    segment: Segment
    count: int
    kept: int
    left: int
    again: bool


class Pass:
    """Forward and backward of one micro-batch: what is kept, and the moments of the backward."""

    def __init__(self, work: Workload, taking: Taking) -> None:
        """Add up a workload.

        Args:
            work: what runs.
            taking: what becomes of dense gradients; see `Taking`.
        """
        self._work, self._taking = work, taking
        self._first = taking == "choosing" or work.spec.gradient_accumulation == 1
        self._taken = taken_by(Basis(work, taking, self._first))
        self._coming = self._coming_parts()
        self._head = self._head_segment()
        self._runs = self._blocks()

    def _coming_parts(self) -> dict[str, int]:
        """Return what the backward leaves of the resident parts, each in whole."""
        work, count = self._work, self._work.num_active
        if not self._first:
            return {}
        parts = {"gradients": work.gradients_bytes}
        if self._taking != "choosing":
            return parts
        if work.spec.method == "spiel-ag":
            parts["gradients"] += work.candidates_bytes - work.candidate_sums_bytes
        else:
            parts["indices"] = work.indices_bytes
            parts["values"] = work.kept_bytes(count)
        return parts

    def _blocks(self) -> list[_Run]:
        """Return the blocks that a gradient reaches, from the last to the first."""
        work, taken, runs = self._work, self._taken, list[_Run]()
        lowest, enters = work.lowest, work.enters_blocks
        reached = (each[lowest:] for each in (taken.blocks, work.kernels, work.kept, taken.left))
        kinds = zip(*reached, (enters or layer > lowest for layer in range(lowest, work.shape.layers)), strict=True)
        buffer = 0 if self._head is None else self._head.backward.buffer
        for (weights, kernel, kept, left, entered), alike in groupby(reversed([*kinds])):
            count = len([*alike])
            while count:
                segment = block_segment(work.shape, work.setting, kernel, weights, kept, entered, buffer)
                same = count if segment.backward.buffer == buffer else 1
                left = segment.backward.staying if work.adapted else left
                runs.append(_Run(segment, same, self._kept_of(kept, segment), left, not kept.inside))
                buffer, count = segment.backward.buffer, count - same
        return runs

    def _head_segment(self) -> Segment | None:
        work = self._work
        trained = self._taken.outside
        if work.shape.layout.label_head:
            pooler = tuple(
                ("pooler", LinearWeight(0, trained=each)) for name, each in trained.items() if is_pooler(name)
            )
            return label_segment(work.shape, work.setting, pooler, self._flows, self._first)
        if not (self._flows or work.trains_head or work.shape.classifier):
            return None
        weights = {
            "head" if name == work.shape.head else "final": LinearWeight(0, trained=weight)
            for name, weight in trained.items()
            if name == work.shape.head or is_last_norm(name)
        }
        if work.shape.classifier:
            head = head_gradient(work.shape.dense_numel, work.setting.element_bytes, self._first)
            weights["head"] = LinearWeight(0, trained=head)
        elif work.chunks_loss:
            weights.pop("head", None)
        elif self._ties:
            # The dense gradient of a tied output layer waits for the embedding's.
            dense = self._taken.outside[work.shape.head or ""].dense
            weights["head"] = LinearWeight(0, trained=Weight(dense, 0, dense))
        return head_segment(work.shape, work.setting, tuple(weights.items()), self._flows, not work.chunks_loss)

    @property
    def _ties(self) -> bool:
        """Whether a dense gradient of the output layer waits for that of the embedding."""
        return self._work.trains_head and self._work.shape.tied

    @property
    def _flows(self) -> bool:
        """Whether a gradient goes below the last norm."""
        return self._work.lowest < self._work.shape.layers

    @property
    def blocks_saved(self) -> int:
        """What the blocks and what they share keep between forward and backward."""
        work, setting = self._work, self._work.setting
        shared = activations.shared_saved_bytes(work.shape, setting) + self._embedding_saved()
        return shared + sum(run.count * run.kept for run in self._runs)

    def _kept_of(self, kept: Kept, segment: Segment) -> int:
        """Return what a block keeps between forward and backward: its input at most, where it is computed anew."""
        if kept.inside:
            return segment.saved
        return 0 if self._work.offloads_inputs else self._work.block_input_bytes

    def _embedding_saved(self) -> int:
        """Return what lies before the blocks, where a gradient gets there.

        Of a norm its input, mean and deviation; of dropout which entries stay; what both are made of, where that is a
        leaf.
        """
        work, layout, e = self._work, self._work.shape.layout, self._work.setting.element_bytes
        if not (work.enters_blocks and (layout.embedding_dropout or layout.embedding_norm)):
            return 0
        leaf = 0 if work.trains_embedding else e
        dropped = (e if work.on_cpu else 1) if layout.embedding_dropout else 0
        normed, stats = (e, 2 * FP32_BYTES) if layout.embedding_norm else (0, 0)
        return ((leaf + dropped + normed) * work.shape.hidden + stats) * work.setting.tokens

    @property
    def head_saved(self) -> int:
        """What the last norm and the output layer keep."""
        return 0 if self._head is None else self._head.saved

    def moments(self, extra: int = 0, choice: int = 0) -> list[Moment]:
        """Return the loss, the output layer's backward, and that of each block and of the embedding.

        `extra`: bytes of what else lies in memory meanwhile; `choice`: once gradients of weights came.
        """
        work, setting = self._work, self._work.setting
        shape, e = work.shape, setting.element_bytes
        walk = _Walk(self.blocks_saved + self.head_saved, self._coming, extra)
        if self._runs and not self._runs[0].again:  # the last block, which comes first in the backward
            walk.at("forward", self._runs[0].segment.forward_peak - self._runs[0].kept - self.head_saved)
        if work.chunks_loss:
            self._chunked_loss(walk)
        else:
            walk.at("loss", activations.loss_transient_bytes(shape.vocabulary, work.predictions))
            walk.moving = e * work.predictions * shape.vocabulary
        walk.extra += choice
        if self._head is not None:
            waiting = self._taken.outside[shape.head or ""].dense if self._ties and not work.chunks_loss else 0
            walk.over("backward of the output layer", self._head, self._head.saved, again=False, waiting=waiting)
        for run in self._runs:
            walk.repeat(run.count, partial(self._block, walk, run))
        if work.trains_embedding:
            self._embedding(walk)
        return walk.moments

    def _block(self, walk: "_Walk", run: _Run) -> None:
        brought = self._work.block_input_bytes if run.again and self._work.offloads_inputs else 0
        walk.moving += brought
        walk.over("backward of one block", run.segment, run.kept, again=run.again)
        walk.moving -= brought
        walk.stay(run.left - run.segment.backward.staying)

    def _chunked_loss(self, walk: "_Walk") -> None:
        """The loss in chunks: what its forward leaves, scaled in the backward; a trained layer's gradient in 16 bit."""
        work, setting, shape = self._work, self._work.setting, self._work.shape
        saved = output_layer.chunked_saved_bytes(shape, setting, work.trains_head)
        forward = output_layer.chunked_forward_bytes(shape, setting, work.trains_head)
        backward = output_layer.chunked_backward_bytes(shape, setting)
        weight = self._taken.outside.get(shape.head or "")
        walk.moving = setting.element_bytes * setting.tokens * shape.hidden
        if weight is None:
            walk.at("loss", saved + max(forward, backward))
            return
        cast = weight.dense if setting.element_bytes != FP32_BYTES else 0
        walk.at("loss", saved + max(forward, backward + cast))
        if self._ties:
            walk.moving += weight.dense
        else:
            walk.at("backward of the output layer", walk.moving + weight.dense + weight.reading)
            walk.stay(weight.staying)

    def _embedding(self, walk: "_Walk") -> None:
        """The embedding's dense gradient; a tied output layer's is summed into it, out of place."""
        work = self._work
        walk.saved -= self._embedding_saved()
        for name in reversed([*work.numels]):
            if is_embedding(name):
                weight = self._taken.outside[name]
                sorting = 0 if work.on_cpu else 5 * INT64_BYTES * work.setting.tokens
                tied = weight.dense if self._ties and name == work.shape.embedding else 0
                walk.at("backward of the embedding", walk.moving + max(weight.dense + sorting, weight.dense + tied))
                walk.at("backward of the embedding", walk.moving - tied + weight.dense + weight.reading)
                walk.stay(weight.staying)


class _Walk:
    """A backward under way: what is still saved, what comes and goes, what has been left of gradients."""

    def __init__(self, saved: int, coming: Mapping[str, int], extra: int) -> None:
        self.saved, self.moving, self.moments = saved, 0, list[Moment]()
        self._coming, self._left, self.extra = coming, 0, extra

    def at(self, phase: str, moving: int) -> None:
        """Note a moment with `moving` bytes beside what is saved."""
        total = sum(self._coming.values())
        missing = 1 - min(1.0, self._left / total) if total else 0.0
        without = {part: int(missing * size) for part, size in self._coming.items()}
        moving += self.extra
        # Below zero: the backward has freed more than it made, and the saved part is smaller by that.
        self.moments.append(Moment(phase, self.saved + min(moving, 0), max(moving, 0), without))

    def over(self, phase: str, segment: Segment, kept: int, *, again: bool, waiting: int = 0) -> None:
        """Go backward over a stretch that kept `kept` bytes.

        Args:
            phase: what it is called.
            segment: the stretch.
            kept: what was saved of it.
            again: whether it is computed anew first.
            waiting: of what is left of gradients, dense ones that wait for more.
        """
        if again:
            self.at(phase, self.moving + segment.forward_peak)
            self.moving += segment.saved
        self.at(phase, self.moving + segment.backward.rise)
        self.moving += segment.backward.change + (0 if again else segment.saved)
        self.saved -= kept
        self.stay(segment.backward.staying - waiting)
        self.moving -= segment.backward.staying - waiting

    def repeat(self, times: int, stretch: Callable[[], None]) -> None:
        """Go over as many equal stretches: each changes every figure alike, so the first or the last holds the most."""
        before = self.saved, self.moving, self._left
        stretch()
        if times > 2:
            changed = [now - then for now, then in zip((self.saved, self.moving, self._left), before, strict=True)]
            saved, moving, left = ((times - 2) * each for each in changed)
            self.saved, self.moving, self._left = self.saved + saved, self.moving + moving, self._left + left
        if times > 1:
            stretch()

    def stay(self, num_bytes: int) -> None:
        """Note what is left of gradients."""
        self._left += num_bytes
