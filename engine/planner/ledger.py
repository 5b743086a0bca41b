"""The life of every storage of a traced step, and what it adds up to: bytes by part, by phase, at the peak. Torch-free.

A storage is told by its number, in order of birth. Events are a list of whole numbers: n where storage n was made, ~n
where it was freed. What lies between the birth in a forward and the end in a backward was saved for it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

MOVING = ("saved_activations", "transients")
MOVING = ("saved_activations", "transients")
RESIDENT = ("parameters", "values", "indices", "gradients", "optimizer_states")
PARTS = (*RESIDENT, *MOVING, "workspace")
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


def add_up(ledger: Ledger, rounding: int = ROUNDING_BYTES, host_apart: bool = True) -> Figures:
    """Return what a settled ledger adds up to.

    Args:
        ledger: of `Ledger.settle`.
        rounding: bytes that each storage is rounded up to a multiple of; 0 for none.
        host_apart: whether main memory is another memory than the device's; else it counts with it.
    """
    if not host_apart:
        ledger.move(HOST, "transients")
    step = max(1, rounding)
    sizes = [-(-storage.num_bytes // step) * step for storage in ledger.storages]
    device, host = (_after_events(ledger, sizes, of_host=of_host) for of_host in (False, True))
    peak, peak_phase = device.index(max(device)), ""
    phases, forwards, last = Counter[str](), list[int](), ""
    for phase, span in ledger.spans():
        most = max(device[span.start : span.stop + 1])
        phases[phase] = max(phases[phase], most)
        if span.start < peak <= span.stop:
            peak_phase = phase
        if last == LOSS and phase == LOSS_BACKWARD:
            forwards.append(span.start)
        last = phase
    fullest = max(forwards, key=lambda count: (device[count], count), default=0)
    return Figures(
        _moment(ledger, sizes, peak, peak_phase),
        _moment(ledger, sizes, fullest, LOSS, merged=False, largest=0) if fullest else _moment(ledger, sizes, 1, ""),
        dict(phases),
        max(host),
    )


def _after_events(ledger: Ledger, sizes: Sequence[int], *, of_host: bool) -> list[int]:
    """Return the bytes that one of the two memories holds after 0, 1, ... events."""
    storages = zip(ledger.storages, sizes, strict=True)
    counted = [size if (storage.part == HOST) == of_host else 0 for storage, size in storages]
    return [*accumulate((counted[event] if event >= 0 else -counted[~event] for event in ledger.events), initial=0)]


def _moment(
    ledger: Ledger, sizes: Sequence[int], count: int, phase: str, *, merged: bool = True, largest: int = LARGEST
) -> Moment:
    """Return what the device holds after `count` events, one at least; merged: what is no part comes and goes."""
    events = ledger.events[:count]
    live = {event for event in events if event >= 0} - {~event for event in events if event < 0}
    parts, groups = dict.fromkeys(PARTS, 0), Counter[tuple[str, str, str]]()
    for number in sorted(live):
        storage, size = ledger.storages[number], sizes[number]
        if storage.part != HOST:
            name = storage.part if storage.part in PARTS or not merged else "transients"
            parts[name] = parts.get(name, 0) + size
            groups[storage.part, storage.operation, storage.module] += size
    last = ledger.storages[max(events[-1], ~events[-1])]
    rows = tuple((*key, size) for key, size in groups.most_common(largest))
    return Moment(parts, phase, last.operation, last.module, rows)
