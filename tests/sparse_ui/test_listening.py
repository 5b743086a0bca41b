"""A handler that streams is left at once, and ended in its own time."""

import asyncio
import threading
from collections.abc import Generator

import pytest

from sparse_ui.listening import leavable


def test_the_pieces_come_in_order_and_an_error_after_them() -> None:
    @leavable
    def count(most: int) -> Generator[int]:
        yield from range(most)
        raise ValueError("enough")

    found = []

    async def listen() -> None:
        async for piece in count(3):
            found.append(piece)

    with pytest.raises(ValueError, match="enough"):
        asyncio.run(listen())
    assert found == [0, 1, 2]


def test_who_leaves_does_not_wait_for_the_piece_that_is_being_made() -> None:
    at_work, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    @leavable
    def load() -> Generator[str]:
        try:
            at_work.set()
            go_on.wait(10)
            yield "loaded"
        finally:
            ended.set()

    async def leave() -> None:
        listening = asyncio.ensure_future(anext(aiter(load())))
        await asyncio.to_thread(at_work.wait, 10)
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening

    asyncio.run(leave())
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(10)
