"""PyTorch's CUDA caching allocator, replayed from the life of every storage: reserved memory. Torch-free.

The rules are those of the native backend on one stream (torch 2.13, CUDACachingAllocator.cpp). Sizes round up to 512
bytes. Blocks of up to 1 MiB come from segments of 2 MiB, blocks under 10 MiB from segments of 20 MiB, larger ones
from segments of their own size rounded up to 2 MiB. The smallest free block that is large enough is taken, and split
where enough is left over. Free neighbours in a segment merge. Where the limit is reached, all segments that are free as
a whole go back to the device, and the allocation is tried once more.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

from engine.planner.ledger import FORWARD, HOST, WRITE_BACK, Ledger
from engine.units import MIB

ROUNDING_BYTES = 512
SMALL_BYTES = 1 * MIB  # blocks up to here are in the pool of small ones
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB  # from here on a block has a segment of its own
SEGMENT_ROUNDING_BYTES = 2 * MIB
LIMIT_STEP_BYTES = 16 * MIB  # how finely the least limit is searched
STATES_KEPT = 16  # of a replay, to go on from

_ADDRESS_BITS = 48
_ADDRESS_MASK = 2**_ADDRESS_BITS - 1

Event = tuple[int, int]  # storage number, bytes; 0 bytes where it is freed


class LimitReachedError(Exception):
    """An allocation does not fit below the limit, even with all free segments given back."""


class Block(NamedTuple):
    """A piece of a segment that is given out."""

    address: int
    size: int
    small: bool


class _Pool:
    """The free blocks of one kind, smallest first, at equal size by address: a key is both in one number."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.sizes: dict[int, int] = {}  # by where they begin
        self.begins: dict[int, int] = {}  # by where they end

    def add(self, address: int, size: int) -> None:
        insort(self.keys, size << _ADDRESS_BITS | address)
        self.sizes[address] = size
        self.begins[address + size] = address

    def remove(self, address: int, size: int) -> None:
        del self.keys[bisect_left(self.keys, size << _ADDRESS_BITS | address)]
        del self.sizes[address]
        del self.begins[address + size]

    def take(self, size: int) -> tuple[int, int] | None:
        """Remove the smallest block that is large enough; return its address and size, or None where there is none."""
        place = bisect_left(self.keys, size << _ADDRESS_BITS)
        if place == len(self.keys):
            return None
        key = self.keys.pop(place)
        address, found = key & _ADDRESS_MASK, key >> _ADDRESS_BITS
        del self.sizes[address]
        del self.begins[address + found]
        return address, found

    def copy(self) -> "_Pool":
        pool = _Pool()
        pool.keys, pool.sizes, pool.begins = self.keys.copy(), self.sizes.copy(), self.begins.copy()
        return pool


class CachingAllocator:
    """An allocator at work. `reserved_bytes` is what it took from the device, `allocated_bytes` what it gave out."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        """Begin with nothing; at most `limit_bytes` are taken from the device."""
        self.limit_bytes = limit_bytes
        self.reserved_bytes = self.allocated_bytes = 0
        self.peak_reserved_bytes = self.peak_allocated_bytes = 0
        self.retries = 0  # times that segments were given back because of the limit
        self._pools = {True: _Pool(), False: _Pool()}
        self._given: dict[int, Block] = {}
        self._segments: dict[int, int] = {}  # sizes by where they begin
        self._next_address = 0

    def copy(self) -> "CachingAllocator":
        """Return another in the same state."""
        twin = copy(self)
        twin._pools = {small: pool.copy() for small, pool in self._pools.items()}
        twin._given, twin._segments = self._given.copy(), self._segments.copy()
        return twin

    def allocate(self, number: int, num_bytes: int) -> None:
        """Give out a block for storage `number`.

        Raises:
            LimitReachedError: it does not fit.
        """
        size = max(ROUNDING_BYTES, _up(num_bytes, ROUNDING_BYTES))
        small = size <= SMALL_BYTES
        pool = self._pools[small]
        address, found = pool.take(size) or self._new_segment(size)
        left = found - size
        if left >= ROUNDING_BYTES if small else left > SMALL_BYTES:
            pool.add(address + size, left)
        else:
            size = found
        self._given[number] = Block(address, size, small)
        self.allocated_bytes += size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes

    def release(self, number: int) -> None:
        """Take the block of storage `number` back; it merges with free neighbours in its segment."""
        address, size, small = self._given.pop(number)
        self.allocated_bytes -= size
        pool, end = self._pools[small], address + size
        if address not in self._segments and (begin := pool.begins.get(address)) is not None:
            pool.remove(begin, address - begin)
            address = begin
        if end not in self._segments and (after := pool.sizes.get(end)) is not None:
            pool.remove(end, after)
            end += after
        pool.add(address, end - address)

    def give_back(self) -> None:
        """Return every segment that is free as a whole to the device."""
        for pool in self._pools.values():
            for address, size in [*pool.sizes.items()]:
                if self._segments.get(address) == size:
                    pool.remove(address, size)
                    del self._segments[address]
                    self.reserved_bytes -= size

    def blocks_given(self) -> list[Block]:
        """Return the blocks that are in use."""
        return [*self._given.values()]

    def _new_segment(self, size: int) -> tuple[int, int]:
        """Take a segment for a block of `size` from the device; return its address and size."""
        segment, address = _segment_bytes(size), self._next_address
        if self.limit_bytes is not None and self.reserved_bytes + segment > self.limit_bytes:
            self.give_back()
            self.retries += 1
            if self.reserved_bytes + segment > self.limit_bytes:
                raise LimitReachedError
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._segments[address] = segment
        self._next_address += segment
        return address, segment


def _segment_bytes(size: int) -> int:
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    return LARGE_SEGMENT_BYTES if size < OWN_SEGMENT_BYTES else _up(size, SEGMENT_ROUNDING_BYTES)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Reserved:
    """What the allocator took and gave out at most; bytes."""

    reserved_bytes: int
    allocated_bytes: int
    retries: int

    @property
    def fragmentation(self) -> float:
        """The share of the reserved memory that is not given out at the peak, in [0, 1)."""
        return 1 - self.allocated_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


def device_events(ledger: Ledger, span: range | None = None) -> list[Event]:
    """Return what happens on the device: (number, bytes) where a storage is made, (number, 0) where it is freed."""
    events = []
    for place in span if span is not None else range(len(ledger.events)):
        event = ledger.events[place]
        number = event if event >= 0 else ~event
        if ledger.storages[number].part != HOST:
            events.append((number, ledger.storages[number].num_bytes if event >= 0 else 0))
    return events


def replay(events: Iterable[Event], limit_bytes: int | None = None) -> Reserved:
    """Return what the allocator takes for `events`.

    Raises:
        LimitReachedError: they do not fit below `limit_bytes`.
    """
    allocator = CachingAllocator(limit_bytes)
    _run(allocator, events)
    return _figures(allocator)


def _run(allocator: CachingAllocator, events: Iterable[Event]) -> None:
    for number, num_bytes in events:
        if num_bytes:
            allocator.allocate(number, num_bytes)
        else:
            allocator.release(number)


def _figures(allocator: CachingAllocator) -> Reserved:
    return Reserved(allocator.peak_reserved_bytes, allocator.peak_allocated_bytes, allocator.retries)


def least_limit_bytes(events: Sequence[Event], step_bytes: int = LIMIT_STEP_BYTES) -> int:
    """Return the least limit, a multiple of `step_bytes`, below which `events` fit; see `replay_and_least_limit`."""
    return replay_and_least_limit(events, step_bytes)[1]


def replay_and_least_limit(events: Sequence[Event], step_bytes: int = LIMIT_STEP_BYTES) -> tuple[Reserved, int]:
    """Return what the allocator takes for `events` without a limit, and the least limit below which they fit.

    The limit, a multiple of `step_bytes`, is searched between the most that is given out and the most that is reserved
    without one; more than one limit may separate what fits from what does not, and one of them is found. Until a limit
    is reached it changes nothing, so each trial goes on from a state of the replay without one that is still below.
    """
    free, states = CachingAllocator(), list[tuple[int, CachingAllocator]]()
    span = max(1, -(-len(events) // STATES_KEPT))
    for start in range(0, len(events), span):
        states.append((start, free.copy()))
        _run(free, events[start : start + span])
    figures = _figures(free)
    low, high = -(-figures.allocated_bytes // step_bytes), -(-figures.reserved_bytes // step_bytes)
    while low < high:
        middle = (low + high) // 2
        start, state = next(each for each in reversed(states) if each[1].reserved_bytes <= middle * step_bytes)
        if _fits(state.copy(), events[start:], middle * step_bytes):
            high = middle
        else:
            low = middle + 1
    return figures, high * step_bytes


def fits(events: Iterable[Event], limit_bytes: int) -> bool:
    """Return whether `events` fit below a limit."""
    return _fits(CachingAllocator(), events, limit_bytes)


def _fits(allocator: CachingAllocator, events: Iterable[Event], limit_bytes: int) -> bool:
    allocator.limit_bytes = limit_bytes
    try:
        _run(allocator, events)
    except LimitReachedError:
        return False
    return True


def last_step(ledger: Ledger) -> range:
    """Return the events of the last optimizer step that a ledger holds whole."""
    starts = [0]
    seen_update = True
    for phase, span in ledger.spans():
        if phase == FORWARD and seen_update:
            starts.append(span.start)
            seen_update = False
        seen_update = seen_update or phase == WRITE_BACK
    return range(starts[-1], len(ledger.events))


def in_sequence(ledgers: Sequence[Ledger]) -> list[Event]:
    """Return the events of a run whose steps differ in length: all of the first ledger, the last step of each other.

    Of the others, only what is made and freed within the step counts: what stays is the first ledger's.
    """
    events = device_events(ledgers[0])
    first = len(ledgers[0].storages)
    for ledger in ledgers[1:]:
        step = device_events(ledger, last_step(ledger))
        freed = {number for number, num_bytes in step if not num_bytes}
        made = {number for number, num_bytes in step if num_bytes}
        events += [(first + number, num_bytes) for number, num_bytes in step if number in freed & made]
        first += len(ledger.storages)
    return events
