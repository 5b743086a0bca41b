"""Handlers that stream and can be left at once.

Gradio ends a plain generator only when its next piece is there, which in a chat takes as long as a model loads, and
takes no other question until then. A handler that awaits its pieces ends where it waits.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_END: Any = object()


def leavable(handler: Callable[P, Generator[T]]) -> Callable[P, AsyncIterator[T]]:
    """Return `handler` with its pieces made in a thread of its own; it is closed there once its listener has left."""

    @wraps(handler)
    async def listen(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        pieces, loop, maker = handler(*args, **kwargs), asyncio.get_running_loop(), ThreadPoolExecutor(1)
        try:
            while (piece := await loop.run_in_executor(maker, next, pieces, _END)) is not _END:
                yield piece
        finally:
            maker.submit(pieces.close)  # after the piece that is being made
            maker.shutdown(wait=False)

    return listen
