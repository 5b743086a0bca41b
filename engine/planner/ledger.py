"""The life of every storage of a traced step, and what it adds up to: bytes by part, by phase, at the peak. Torch-free.

A storage is told by its number, in order of birth. Events are a list of whole numbers: n where storage n was made, ~n
where it was freed. What lies between the birth in a forward and the end in a backward was saved for it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

RESIDENT = ("parameters", "values", "indices", "gradients", "optimizer_states")
PARTS = (*RESIDENT, "saved_activations", "transients", "workspace")
LOGITS = "logits"  # told apart from the saved activations, which the paper's figure is without
HOST = "host"  # in main memory beside a run on a GPU
FORWARD, LOSS, LOSS_BACKWARD, BACKWARD = "forward", "loss", "backward of the loss", "backward"
SELECTION, OPTIMIZER, WRITE_BACK = "selection", "optimizer step", "write-back"
ROUNDING_BYTES = 512  # of PyTorch's CUDA allocator
LARGEST = 12  # storages listed at the peak


@dataclass
class Storage:
    """One storage or, where an operation works in memory of its own, that; `part` is empty until somebody knows."""

    num_bytes: int
    operation: str
    module: str
    phase: str
    part: str = ""


@dataclass
class Ledger:
    """The events of a step as they happen. `phases`: from which event on, each."""

    storages: list[Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)

    @property
    def phase(self) -> str:
        """The phase that is now."""
        return self.phases[-1][1] if self.phases else "preparation"

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self.phases.append((len(self.events), phase))

    def open(self, num_bytes: int, operation: str, module: str, part: str = "") -> int:
        """Note a new storage; return its number."""
        number = len(self.storages)
        self.storages.append(Storage(num_bytes, operation, module, self.phase, part))
        self.events.append(number)
        return number

    def close(self, number: int) -> None:
        """Note that a storage was freed."""
        self.events.append(~number)

    def spans(self) -> Iterable[tuple[str, range]]:
        """Return each phase and its events, in order."""
        bounds = [*(start for start, _ in self.phases), len(self.events)]
        if bounds[0]:
            yield "preparation", range(bounds[0])
        for (start, phase), end in zip(self.phases, bounds[1:], strict=True):
            yield phase, range(start, end)

    def settle(self) -> None:
        """Give every storage a part: what a backward frees and a forward made was saved; the rest comes and goes."""
        for phase, span in self.spans():
            if phase not in (LOSS_BACKWARD, BACKWARD):
                continue
            for place in span:
                event = self.events[place]
                if event < 0 and self._made_in_forward(~event):
                    self.storages[~event].part = "saved_activations"
        for storage in self.storages:
            storage.part = storage.part or "transients"

    def move(self, part: str, other: str) -> None:
        """Let everything that is `part` be `other`."""
        for storage in self.storages:
            storage.part = other if storage.part == part else storage.part

    def _made_in_forward(self, number: int) -> bool:
        storage = self.storages[number]
        return not storage.part and storage.phase in (FORWARD, LOSS)


@dataclass(frozen=True)
class Moment:
    """A point of a step: bytes by part, and the operation and the module that were at work."""

    parts: dict[str, int]
    phase: str
    operation: str
    module: str
    largest: tuple[tuple[str, str, str, int], ...] = ()  # part, operation, module, bytes

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Figures:
    """What a traced step adds up to, without context; bytes.

    `peak`: the moment of most memory. `after_forward`: the fullest end of a forward, its loss
    included, logits told apart. `phases`: the
    most in each phase. `host_bytes`: the most in main memory beside a run on a GPU.
    """

    peak: Moment
    after_forward: Moment
    phases: dict[str, int]
    host_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Figures":
        """Return what `to_dict` gave."""
        peak, after = (
            Moment(**{**body[name], "largest": tuple(tuple(row) for row in body[name]["largest"])})
            for name in ("peak", "after_forward")
        )
        return cls(peak, after, body["phases"], body["host_bytes"])


class _Running:
    """Sums by part while events go by."""

    def __init__(self, ledger: Ledger, rounding: int) -> None:
        self.ledger, self.parts = ledger, Counter[str]()
        step = max(1, rounding)
        self.sizes = [-(-storage.num_bytes // step) * step for storage in ledger.storages]
        self.total = 0

    def apply(self, event: int) -> None:
        number = event if event >= 0 else ~event
        size = self.sizes[number] if event >= 0 else -self.sizes[number]
        part = self.ledger.storages[number].part
        self.parts[part] += size
        if part != HOST:
            self.total += size

    def moment(self, phase: str, at: int, *, merged: bool) -> Moment:
        storage = self.ledger.storages[at]
        parts = dict.fromkeys(PARTS, 0)
        for part, size in self.parts.items():
            if part != HOST and size:
                name = part if part in PARTS or not merged else "transients"
                parts[name] = parts.get(name, 0) + size
        return Moment(parts, phase, storage.operation, storage.module)


def add_up(ledger: Ledger, rounding: int = ROUNDING_BYTES, host_apart: bool = True) -> Figures:
    """Return what a settled ledger adds up to.

    Args:
        ledger: of `Ledger.settle`.
        rounding: bytes that each storage is rounded up to a multiple of; 0 for none.
        host_apart: whether main memory is another memory than the device's; else it counts with it.
    """
    if not host_apart:
        ledger.move(HOST, "transients")
    running = _Running(ledger, rounding)
    best, phases, host = (-1, 0, ""), Counter[str](), 0
    after: Moment | None = None
    last = ""
    for phase, span in ledger.spans():
        if last == LOSS and phase == LOSS_BACKWARD:
            now = running.moment(LOSS, ledger.events[span.start - 1] if span.start else 0, merged=False)
            after = now if after is None or now.total >= after.total else after
        last = phase
        phases[phase] = max(phases[phase], running.total)
        for place in span:
            running.apply(ledger.events[place])
            if running.total > phases[phase]:
                phases[phase] = running.total
                if running.total > best[0]:
                    best = (running.total, place, phase)
            host = max(host, running.parts[HOST])
    return Figures(
        _peak(ledger, rounding, best[1], best[2]), after or _peak(ledger, rounding, 0, ""), dict(phases), host
    )


def _peak(ledger: Ledger, rounding: int, place: int, phase: str) -> Moment:
    running = _Running(ledger, rounding)
    live: set[int] = set()
    for event in ledger.events[: place + 1]:
        running.apply(event)
        live.add(event) if event >= 0 else live.discard(~event)
    event = ledger.events[place]
    moment = running.moment(phase, event if event >= 0 else ~event, merged=True)
    groups: Counter[tuple[str, str, str]] = Counter()
    for number in live:
        storage = ledger.storages[number]
        if storage.part != HOST:
            groups[storage.part, storage.operation, storage.module] += running.sizes[number]
    largest = tuple((*key, size) for key, size in groups.most_common(LARGEST))
    return Moment(moment.parts, moment.phase, moment.operation, moment.module, largest)
