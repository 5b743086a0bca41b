"""Handlers that stream and can be left at once.

Gradio ends a plain generator only when its next piece is there, which in a chat takes as long as a model loads, and
takes no other question until then. A handler that awaits its pieces ends where it waits. To cancel it, Gradio ends
whatever this handler does for the page by then: on a busy computer that is the next question. `Stops` ends what runs
when it is asked, as a handler that came to its end.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import gradio as gr

T = TypeVar("T")
_END: Any = object()


class Stops:
    """What ends the handlers at work for a page."""

    def __init__(self) -> None:
        self._at_work: dict[str | None, set[asyncio.Event]] = defaultdict(set)

    def stop(self, page: str | None) -> None:
        """End what is at work for the page with this session; on the loop that the handlers run on."""
        for stop in self._at_work.get(page, ()):
            stop.set()

    def begin(self, page: str | None) -> asyncio.Event:
        """Return what says that a handler which begins for this page is to end."""
        stop = asyncio.Event()
        self._at_work[page].add(stop)
        return stop

    def end(self, page: str | None, stop: asyncio.Event) -> None:
        """Forget a handler that has ended."""
        self._at_work[page].discard(stop)
        if not self._at_work[page]:
            del self._at_work[page]


def leavable(handler: Callable[..., Generator[T]], stops: Stops) -> Callable[..., AsyncIterator[T]]:
    """Return `handler` with its pieces made in a thread of its own; it is closed there once nobody listens any more."""

    async def listen(request: gr.Request, *inputs: Any) -> AsyncIterator[T]:
        pieces, loop, maker = handler(*inputs), asyncio.get_running_loop(), ThreadPoolExecutor(1)
        stop = stops.begin(request.session_hash)
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while True:
                coming = loop.run_in_executor(maker, next, pieces, _END)
                await asyncio.wait((coming, stopped), return_when=asyncio.FIRST_COMPLETED)
                if stop.is_set() or (piece := coming.result()) is _END:
                    return
                yield piece
        finally:
            stopped.cancel()
            stops.end(request.session_hash, stop)
            maker.submit(pieces.close)  # after the piece that is being made
            maker.shutdown(wait=False)

    return listen
