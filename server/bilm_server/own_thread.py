"""Functions in threads of their own, which no end of the process waits for, and which end with the function."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

R = TypeVar("R")


def in_own_thread(function: Callable[[], R], name: str) -> "tuple[asyncio.Future[R], threading.Thread]":
    """Run a function beside the event loop; return the future of what it ends in, and the thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[R] = loop.create_future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:  # whatever it is, somebody waits for it
            _tell(loop, future, error)
        else:
            _tell(loop, future, result)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return future, thread


def _tell(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[R]", outcome: "R | BaseException") -> None:
    """End a future from another thread, unless it or its loop has ended."""

    def end() -> None:
        if future.done():
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(end)
