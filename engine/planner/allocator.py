"""PyTorch's CUDA caching allocator, replayed from the life of every storage: reserved memory. Torch-free.

The rules are those of the native backend on one stream (torch 2.13, CUDACachingAllocator.cpp). Sizes round up to 512
bytes. Blocks of up to 1 MiB come from segments of 2 MiB, blocks under 10 MiB from segments of 20 MiB, larger ones
from segments of their own size rounded up to 2 MiB. The smallest free block that is large enough is taken, and split
where enough is left over. Free neighbours in a segment merge. Where the limit is reached, all segments that are free as
a whole go back to the device, and the allocation is tried once more.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.planner.ledger import FORWARD, HOST, WRITE_BACK, Ledger
from engine.units import MIB

ROUNDING_BYTES = 512
SMALL_BYTES = 1 * MIB  # blocks up to here are in the pool of small ones
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB  # from here on a block has a segment of its own
SEGMENT_ROUNDING_BYTES = 2 * MIB
LIMIT_STEP_BYTES = 16 * MIB  # how finely the least limit is searched

_ADDRESS_BITS = 48

Event = tuple[int, int]  # storage number, bytes; 0 bytes where it is freed


class LimitReachedError(Exception):
    """An allocation does not fit below the limit, even with all free segments given back."""


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment; `before` and `after` are its neighbours in the same one."""

    address: int
    size: int
    small: bool
    free: bool = True
    before: "Block | None" = None
    after: "Block | None" = None

    @property
    def whole_segment(self) -> bool:
        """Whether the segment is not split."""
        return self.before is None and self.after is None


@dataclass
class _Pool:
    """The free blocks of one kind, smallest first, at equal size by address: a key is both in one number."""

    keys: list[int] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block

    def remove(self, block: Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]

    def take(self, size: int) -> Block | None:
        """Remove and return the smallest block that is large enough; None where there is none."""
        place = bisect_left(self.keys, size << _ADDRESS_BITS)
        return self.blocks.pop(self.keys.pop(place)) if place < len(self.keys) else None


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
        self._next_address = 0

    def allocate(self, number: int, num_bytes: int) -> None:
        """Give out a block for storage `number`.

        Raises:
            LimitReachedError: it does not fit.
        """
        size = max(ROUNDING_BYTES, _up(num_bytes, ROUNDING_BYTES))
        small = size <= SMALL_BYTES
        block = self._pools[small].take(size) or self._new_segment(size, small)
        if block.size != size:
            self._split(block, size)
        block.free = False
        self._given[number] = block
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes

    def release(self, number: int) -> None:
        """Take the block of storage `number` back."""
        block = self._given.pop(number)
        self.allocated_bytes -= block.size
        block.free = True
        if block.before is not None and block.before.free:
            block = self._merge(block.before, block, stale=block.before)
        if block.after is not None and block.after.free:
            block = self._merge(block, block.after, stale=block.after)
        self._pools[block.small].add(block)

    def give_back(self) -> None:
        """Return every segment that is free as a whole to the device."""
        for pool in self._pools.values():
            for block in [each for each in pool.blocks.values() if each.whole_segment]:
                pool.remove(block)
                self.reserved_bytes -= block.size

    def blocks_given(self) -> list[Block]:
        """Return the blocks that are in use."""
        return [*self._given.values()]

    def _new_segment(self, size: int, small: bool) -> Block:
        segment = _segment_bytes(size)
        if self.limit_bytes is not None and self.reserved_bytes + segment > self.limit_bytes:
            self.give_back()
            self.retries += 1
            if self.reserved_bytes + segment > self.limit_bytes:
                raise LimitReachedError
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = Block(self._next_address, segment, small)
        self._next_address += segment
        return block

    def _split(self, block: Block, size: int) -> None:
        left = block.size - size
        if left < ROUNDING_BYTES if block.small else left <= SMALL_BYTES:
            return
        rest = Block(block.address + size, left, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._pools[block.small].add(rest)

    def _merge(self, left: Block, right: Block, stale: Block) -> Block:
        """Make one block of two free neighbours; `stale` is the one among the free blocks."""
        self._pools[stale.small].remove(stale)
        left.size += right.size
        left.after = right.after
        if right.after is not None:
            right.after.before = left
        return left


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
    for number, num_bytes in events:
        if num_bytes:
            allocator.allocate(number, num_bytes)
        else:
            allocator.release(number)
    return Reserved(allocator.peak_reserved_bytes, allocator.peak_allocated_bytes, allocator.retries)


def least_limit_bytes(events: Sequence[Event], free: Reserved, step_bytes: int = LIMIT_STEP_BYTES) -> int:
    """Return the least limit, a multiple of `step_bytes`, below which `events` fit.

    Searched between the most that is given out and the most that is reserved without a limit; more than one limit may
    separate what fits from what does not, and one of them is found.

    Args:
        events: as `replay` takes them.
        free: what `replay` gave for them without a limit.
        step_bytes: between limits.
    """
    low, high = -(-free.allocated_bytes // step_bytes), -(-free.reserved_bytes // step_bytes)
    while low < high:
        middle = (low + high) // 2
        if fits(events, middle * step_bytes):
            high = middle
        else:
            low = middle + 1
    return high * step_bytes


def fits(events: Iterable[Event], limit_bytes: int) -> bool:
    """Return whether `events` fit below a limit."""
    try:
        replay(events, limit_bytes)
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
