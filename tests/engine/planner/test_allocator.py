"""The caching allocator by hand on small cases, and what always holds."""

import random
from itertools import pairwise

import pytest

from engine.planner.allocator import (
    CachingAllocator,
    LimitReachedError,
    device_events,
    fits,
    in_sequence,
    last_step,
    least_limit_bytes,
    replay,
    replay_and_least_limit,
)
from engine.planner.ledger import FORWARD, HOST, WRITE_BACK, Ledger
from engine.units import MIB


@pytest.mark.parametrize(
    ("num_bytes", "segment", "given"),
    [
        (1, 2 * MIB, 512),
        (513, 2 * MIB, 1024),
        (MIB, 2 * MIB, MIB),
        (MIB + 1, 20 * MIB, MIB + 512),
        (10 * MIB - 512, 20 * MIB, 10 * MIB - 512),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB left over is not split off
        (11 * MIB - 512, 12 * MIB, 11 * MIB - 512),
        (19 * MIB + 1, 20 * MIB, 20 * MIB),
    ],
)
def test_segments_and_blocks_have_pytorchs_sizes(num_bytes: int, segment: int, given: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(0, num_bytes)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (segment, given)


def test_a_freed_block_is_used_again_and_neighbours_merge() -> None:
    allocator = CachingAllocator()
    for number in range(4):
        allocator.allocate(number, 5 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.release(1)
    allocator.release(2)
    allocator.allocate(4, 9 * MIB)  # only the merged hole of 10 MiB is large enough
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (20 * MIB, 19 * MIB + 1 * MIB)


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator()
    for number, size in enumerate((40, 30, 20)):
        allocator.allocate(number, size * MIB)
    for number in range(3):
        allocator.release(number)
    allocator.allocate(3, 25 * MIB)
    (block,) = allocator.blocks_given()
    assert (block.address, block.size) == (40 * MIB, 25 * MIB)


def test_small_and_large_blocks_do_not_share_segments() -> None:
    allocator = CachingAllocator()
    allocator.allocate(0, 19 * MIB)
    allocator.release(0)
    allocator.allocate(1, MIB)
    assert allocator.reserved_bytes == 22 * MIB


def test_free_segments_go_back_where_the_limit_is_reached() -> None:
    events = [(0, 40 * MIB), (0, 0), (1, 60 * MIB)]
    assert replay(events).reserved_bytes == 100 * MIB
    limited = replay(events, 60 * MIB)
    assert (limited.reserved_bytes, limited.retries) == (60 * MIB, 1)
    assert least_limit_bytes(events, MIB) == 60 * MIB


def test_a_split_segment_cannot_go_back() -> None:
    events = [(0, 40 * MIB), (0, 0), (1, 20 * MIB), (2, 60 * MIB)]
    assert not fits(events, 99 * MIB)
    assert least_limit_bytes(events, MIB) == 100 * MIB
    with pytest.raises(LimitReachedError):
        replay(events, 99 * MIB)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_never_overlap_and_reserved_holds_them(seed: int) -> None:
    drawn, allocator, live = random.Random(seed), CachingAllocator(), set[int]()
    for number in range(600):
        if live and drawn.random() < 0.45:
            victim = drawn.choice(sorted(live))
            allocator.release(victim)
            live.remove(victim)
        else:
            allocator.allocate(number, int(2 ** drawn.uniform(0, 26)))
            live.add(number)
        assert allocator.allocated_bytes <= allocator.reserved_bytes
    spans = sorted((block.address, block.address + block.size) for block in allocator.blocks_given())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert sum(end - start for start, end in spans) == allocator.allocated_bytes
    for number in live:
        allocator.release(number)
    allocator.give_back()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_least_limit_lies_between_allocated_and_reserved(seed: int) -> None:
    drawn = random.Random(seed)
    events, live = [], list[int]()
    for number in range(300):
        events.append((number, int(2 ** drawn.uniform(18, 26))))
        live.append(number)
        while len(live) > 8:
            events.append((live.pop(drawn.randrange(len(live))), 0))
    free, least = replay(events), least_limit_bytes(events, MIB)
    assert free.allocated_bytes <= least <= free.reserved_bytes
    assert fits(events, least)
    assert replay_and_least_limit(events, MIB) == (free, least)


@pytest.mark.parametrize("seed", range(3))
def test_a_trial_that_goes_on_from_a_copied_state_is_a_whole_one(seed: int) -> None:
    drawn = random.Random(seed)
    events, live = [], list[int]()
    for number in range(300):
        events.append((number, int(2 ** drawn.uniform(10, 26))))
        live.append(number)
        while len(live) > 8:
            events.append((live.pop(drawn.randrange(len(live))), 0))
    free, found = replay_and_least_limit(events, MIB)
    low, high = -(-free.allocated_bytes // MIB), -(-free.reserved_bytes // MIB)
    while low < high:  # every trial from the beginning
        middle = (low + high) // 2
        low, high = (low, middle) if fits(events, middle * MIB) else (middle + 1, high)
    assert (free, found) == (replay(events), high * MIB)


def _step(size: int) -> Ledger:
    """Two steps that each take `size` bytes for a while, beside 30 MiB that stay and 5 MiB in main memory."""
    ledger = Ledger()
    ledger.open(30 * MIB, "", "", "parameters")
    ledger.open(5 * MIB, "", "", HOST)
    for _ in range(2):
        ledger.enter(FORWARD)
        number = ledger.open(size, "", "")
        ledger.close(number)
        ledger.enter(WRITE_BACK)
    return ledger


def test_only_the_device_counts_and_the_last_step_is_found() -> None:
    ledger = _step(40 * MIB)
    assert replay(device_events(ledger)).reserved_bytes == 70 * MIB
    assert [ledger.events[place] for place in last_step(ledger)] == [3, ~3]


def test_steps_of_growing_length_fragment() -> None:
    growing = in_sequence([_step(40 * MIB), _step(50 * MIB), _step(60 * MIB)])
    falling = in_sequence([_step(60 * MIB), _step(50 * MIB), _step(40 * MIB)])
    assert replay(growing).reserved_bytes == 180 * MIB
    assert replay(falling).reserved_bytes == 90 * MIB
    assert least_limit_bytes(growing, MIB) == 90 * MIB
