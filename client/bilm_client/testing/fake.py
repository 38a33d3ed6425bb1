"""Clients that answer by themselves. Everything but the network is the real client's: arguments, results, errors."""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from typing import Any

from bilm_client._inputs import Input
from bilm_client._job import EmbedJob, Outcome
from bilm_client._session import StreamSession
from bilm_client._settings import Deadline, Patience
from bilm_client.aio import AsyncClient
from bilm_client.client import Client
from bilm_client.results import HealthStatus, ModelInfo
from bilm_client.testing.service import FakeService, FakeStream


class FakeClient(Client):
    """A `Client` without a server: the same surface, deterministic vectors.

    Args:
        layer_count: Layers, the token layer included.
        width: Components of a vector.
        failures: Reason by sentence (the text, or the tokens joined by spaces) that shall fail.
        health: What `health` answers.
    """

    def __init__(
        self,
        *,
        layer_count: int = 3,
        width: int = 16,
        failures: Mapping[str, str] | None = None,
        health: HealthStatus = HealthStatus.SERVING,
    ) -> None:
        super().__init__("fake")
        self._service = FakeService(layer_count, width, failures)
        self._health = health

    def __getstate__(self) -> dict[str, Any]:
        return _arguments(self._service, self._health)

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        FakeClient.__init__(self, **arguments)

    def health(self, service: str = "", *, timeout_s: float | None = None) -> HealthStatus:
        """What the constructor was told."""
        self._check_open()
        self._settings.deadline(timeout_s)
        return self._health

    def _run_parts(self, job: EmbedJob, deadline: Deadline) -> None:
        _answer(job, self._service)

    def _fetch_model_info(self, deadline: Deadline) -> ModelInfo:
        self._check_open()
        return ModelInfo.from_proto(self._service.get_model())

    def _stream(
        self, session: StreamSession, inputs: Iterator[Input], patience: Patience
    ) -> Generator[Outcome, None, None]:
        stream = _FakeStream(session, self._service)
        for source in inputs:
            self._check_open()
            yield stream.outcome(source)


class FakeAsyncClient(AsyncClient):
    """An `AsyncClient` without a server; see `FakeClient`.

    Args:
        layer_count: Layers, the token layer included.
        width: Components of a vector.
        failures: Reason by sentence (the text, or the tokens joined by spaces) that shall fail.
        health: What `health` answers.
    """

    def __init__(
        self,
        *,
        layer_count: int = 3,
        width: int = 16,
        failures: Mapping[str, str] | None = None,
        health: HealthStatus = HealthStatus.SERVING,
    ) -> None:
        super().__init__("fake")
        self._service = FakeService(layer_count, width, failures)
        self._health = health

    def __getstate__(self) -> dict[str, Any]:
        return _arguments(self._service, self._health)

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        FakeAsyncClient.__init__(self, **arguments)

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> HealthStatus:
        """What the constructor was told."""
        self._check_open()
        self._settings.deadline(timeout_s)
        return self._health

    async def _run_parts(self, job: EmbedJob, deadline: Deadline) -> None:
        _answer(job, self._service)

    async def _fetch_model_info(self, deadline: Deadline) -> ModelInfo:
        self._check_open()
        return ModelInfo.from_proto(self._service.get_model())

    async def _stream(
        self,
        session: StreamSession,
        inputs: Iterator[Input] | AsyncIterator[Input],
        patience: Patience,
    ) -> AsyncGenerator[Outcome, None]:
        stream = _FakeStream(session, self._service)
        if isinstance(inputs, AsyncIterator):
            async for source in inputs:
                self._check_open()
                yield stream.outcome(source)
        else:
            for source in inputs:
                self._check_open()
                yield stream.outcome(source)


def _arguments(service: FakeService, health: HealthStatus) -> dict[str, Any]:
    """The arguments that a fake was made with, for pickle."""
    return {
        "layer_count": service.layer_count,
        "width": service.width,
        "failures": service.failures,
        "health": health,
    }


def _answer(job: EmbedJob, service: FakeService) -> None:
    while (part := job.take()) is not None:
        job.succeed(part, service.embed(job.request(part)))


class _FakeStream:
    """Answers the items of a session one by one."""

    def __init__(self, session: StreamSession, service: FakeService) -> None:
        self._session = session
        self._service = service
        self._stream: FakeStream | None = None

    def outcome(self, source: Input) -> Outcome:
        """The result of the next sentence."""
        message = self._session.add(source)
        if self._stream is None:
            opening = self._session.opening()  # the first item of an opening brings the initial state
            self._stream, message = FakeStream(self._service, opening[0].start), opening[1]
        self._session.receive(self._stream.answer(message.item))
        outcome = self._session.take()
        assert outcome is not None  # noqa: S101 - a response that the session took is its next result
        return outcome
