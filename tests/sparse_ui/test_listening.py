"""A handler that streams is left at once, and ended in its own time."""

import asyncio
import threading
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_ui.listening import Stops, after_stop, leavable

PAGE: Any = SimpleNamespace(session_hash="page")


def test_the_pieces_come_in_order_and_an_error_after_them() -> None:
    def count(most: int) -> Generator[int]:
        yield from range(most)
        raise ValueError("enough")

    found = []

    async def listen() -> None:
        async for piece in leavable(count, Stops(), -1)(PAGE, 3):
            found.append(piece)

    with pytest.raises(ValueError, match="enough"):
        asyncio.run(listen())
    assert found == [0, 1, 2]


@pytest.mark.parametrize("by_stop", [False, True])
def test_who_leaves_does_not_wait_for_the_piece_that_is_being_made(by_stop: bool) -> None:
    at_work, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    stops = Stops()

    def load() -> Generator[str]:
        try:
            at_work.set()
            go_on.wait(10)
            yield "loaded"
        finally:
            ended.set()

    async def leave() -> None:
        pieces = aiter(leavable(load, stops, "nothing")(PAGE))
        listening = asyncio.ensure_future(anext(pieces))
        await asyncio.to_thread(at_work.wait, 10)
        if by_stop:
            await stops.stop("another page")
            stopped = asyncio.ensure_future(after_stop(ended.is_set, stops)(PAGE))
            assert [await listening, *[piece async for piece in pieces]] == ["nothing"]
            assert not await stopped  # what is done upon the stop does not wait either
        else:
            listening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await listening

    asyncio.run(leave())
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(10)


def test_a_stop_ends_what_is_at_work_and_not_what_comes_next() -> None:
    stops = Stops()

    def count() -> Generator[int]:
        yield from range(3)

    async def listen() -> list[int]:
        await stops.stop("page")
        return [piece async for piece in leavable(count, stops, -1)(PAGE)]

    assert asyncio.run(listen()) == [0, 1, 2]
