"""Ticks as CUDA graphs: captured, and replayed once, before anything is served."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Some work, captured."""

    def replay(self) -> None:
        """Execute it."""


Capture = Callable[[Callable[[], None]], Graph]
"""Make a graph of the work that a function asks of the device; nothing is executed."""

Captures = Callable[[torch.device], AbstractContextManager[Capture]]
"""Make a device ready for captures; in the context, all work is on a stream that can be captured."""


@contextlib.contextmanager
def cuda_captures(device: torch.device) -> Iterator[Capture]:
    """Capture on a stream beside the current one, into one pool of memory; wait for the stream at the end."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield functools.partial(captured, pool=pool, new_graph=torch.cuda.CUDAGraph)
        stream.synchronize()


def captured(work: Callable[[], None], pool: object, new_graph: Callable[[], Any]) -> Graph:
    """Return the graph of work on the current stream.

    Raises:
        Exception: What the work raises, when the capture has ended: a stream that is left capturing takes no work.
    """
    graph = new_graph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        work()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # it raises, too: what was captured is no graph
            graph.capture_end()
        raise
    graph.capture_end()
    found: Graph = graph
    return found
