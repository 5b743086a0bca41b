"""Handlers that stream and can be left at once.

Gradio ends a plain generator only when its next piece is there, which in a chat takes as long as a model loads, and
takes no other question until then. A handler that awaits its pieces ends where it waits. To cancel it, Gradio ends
whatever this handler does for the page by then: on a busy computer that is the next question. `Stops` ends what runs
when it is asked, as a handler that came to its end. With the end Gradio sends the last piece once more, which may come
after whatever was done upon the stop: so the last piece of what is stopped is one that changes nothing.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import gradio as gr

T = TypeVar("T")
_END: Any = object()
_PATIENCE_S = 2.0


class Stops:
    """What ends the handlers at work for a page."""

    def __init__(self) -> None:
        self._at_work: dict[str | None, list[tuple[asyncio.Event, asyncio.Event]]] = defaultdict(list)

    async def stop(self, page: str | None) -> None:
        """End what is at work for the page with this session, and wait until none of its pieces comes any more."""
        for stop, ended in [*self._at_work.get(page, ())]:
            stop.set()
            with suppress(TimeoutError):  # of a page that has gone, nobody takes the last piece
                await asyncio.wait_for(ended.wait(), _PATIENCE_S)

    @contextmanager
    def at_work(self, page: str | None) -> Iterator[asyncio.Event]:
        """Yield what says that the handler which works for this page in the body is to end."""
        stop, ended = asyncio.Event(), asyncio.Event()
        self._at_work[page].append((stop, ended))
        try:
            yield stop
        finally:
            ended.set()
            self._at_work[page].remove((stop, ended))
            if not self._at_work[page]:
                del self._at_work[page]


def after_stop(handler: Callable[..., T], stops: Stops) -> Callable[..., Coroutine[Any, Any, T]]:
    """Return `handler`, called in a thread of its own once what is at work for the page has been ended."""

    async def call(request: gr.Request, *inputs: Any) -> T:
        await stops.stop(request.session_hash)
        return await asyncio.to_thread(handler, *inputs)

    return call


def leavable(handler: Callable[..., Generator[T]], stops: Stops, nothing: T) -> Callable[..., AsyncIterator[T]]:
    """Return `handler` with its pieces made in a thread of its own; it is closed there once nobody listens any more.

    Where it is stopped, its last piece is `nothing`, which changes nothing in the page.
    """

    async def listen(request: gr.Request, *inputs: Any) -> AsyncIterator[T]:
        pieces, loop, maker = handler(*inputs), asyncio.get_running_loop(), ThreadPoolExecutor(1)
        with stops.at_work(request.session_hash) as stop:
            stopped = asyncio.ensure_future(stop.wait())
            try:
                while True:
                    coming = loop.run_in_executor(maker, next, pieces, _END)
                    await asyncio.wait((coming, stopped), return_when=asyncio.FIRST_COMPLETED)
                    if stop.is_set():
                        yield nothing
                        return
                    if (piece := coming.result()) is _END:
                        return
                    yield piece
            finally:
                stopped.cancel()
                maker.submit(pieces.close)  # after the piece that is being made
                maker.shutdown(wait=False)

    return listen
