"""Which calls pass which door: real grpc servers with small services of all kinds, and no model."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from bilm_api.constants import Reason
from bilm_server.embedding.call_gate import CallGate
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.errors import RefusalError
from bilm_server.observability.alerts import AlertHandler
from bilm_server.observability.call_record import UNKNOWN_METHOD, CallRecord
from bilm_server.protocols.grpc.handlers import from_bytes
from bilm_server.protocols.grpc.health import HealthReporter
from bilm_server.protocols.grpc.interceptors import CallInterceptor, OpenInterceptor
from bilm_server.protocols.grpc.late_service import RETRY_AFTER_MS, LateService
from bilm_server.security.auth import Caller
from bilm_server.security.callers import CallerRights
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

OWN, FOREIGN, OPEN = "own.v1.Own", "foreign.v1.Foreign", "open.v1.Open"
HEALTH = "grpc.health.v1.Health"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
AUTHORIZED = (("authorization", "yes"),)
Code = grpc.StatusCode


def services() -> list[grpc.GenericRpcHandler]:
    return [
        grpc.method_handlers_generic_handler(
            name,
            {
                "unary_unary": grpc.unary_unary_rpc_method_handler(unary),
                "unary_stream": grpc.unary_stream_rpc_method_handler(yielded),
                "stream_unary": grpc.stream_unary_rpc_method_handler(joined),
                "stream_stream": grpc.stream_stream_rpc_method_handler(each),
                "Fails": grpc.unary_unary_rpc_method_handler(failing),
                "Missing": grpc.unary_unary_rpc_method_handler(missing),
                "Aborts": grpc.unary_unary_rpc_method_handler(aborting),
            },
        )
        for name in (OWN, FOREIGN, OPEN)
    ]


async def unary(request: bytes, context: Any) -> bytes:
    return request


async def yielded(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield request


async def joined(requests: AsyncIterator[bytes], context: Any) -> bytes:
    return b"".join([request async for request in requests])


async def each(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def failing(request: bytes, context: Any) -> bytes:
    raise KeyError(request)


def missing(request: bytes, context: Any) -> bytes:
    context.set_code(Code.UNIMPLEMENTED)
    raise NotImplementedError("as generated code has it")


async def aborting(request: bytes, context: Any) -> None:
    await context.abort(Code.DATA_LOSS, "as it likes")


class Ends:
    """Keeps the calls that have ended."""

    def __init__(self) -> None:
        self._calls: asyncio.Queue[CallRecord] = asyncio.Queue()

    def begin(self, call: CallRecord) -> None:
        pass

    def end(self, call: CallRecord) -> None:
        self._calls.put_nowait(call)

    async def call(self) -> CallRecord:
        return await asyncio.wait_for(self._calls.get(), 20)

    async def next(self) -> tuple[str, str, str]:
        call = await self.call()
        return call.method, str(call.code), call.caller

    @property
    def none(self) -> bool:
        return self._calls.empty()


class OnePassword:
    """Knows one caller."""

    def identify(self, metadata: Any, peer: str, auth_context: Any) -> Caller:
        if not set(AUTHORIZED) & {(key, str(value)) for key, value in metadata}:
            raise RefusalError(Reason.UNAUTHENTICATED, "a token is needed")
        return Caller("somebody")


def gate(ends: Ends) -> CallGate:
    return CallGate(OnePassword(), CallerRights((), authenticated=True), CallerLimits(0, 0, 1), [ends])


@pytest.fixture
def ends() -> Ends:
    return Ends()


@contextlib.asynccontextmanager
async def serving(interceptor: grpc.aio.ServerInterceptor) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[interceptor])
    server.add_generic_rpc_handlers(services())
    HealthReporter(OWN).add_to(server)
    add: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
    add(reflection.aio.ReflectionServicer((OWN, reflection.SERVICE_NAME)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


@pytest.fixture
async def guarded(ends: Ends) -> AsyncIterator[grpc.aio.Channel]:
    """A server as on the address of the calls, with reflection."""
    open_names = {OPEN, HEALTH, reflection.SERVICE_NAME}
    async with serving(CallInterceptor(OWN, gate(ends), open_names)) as channel:
        yield channel


async def test_a_call_that_succeeds_has_the_trailer_and_no_other(ends: Ends) -> None:
    interceptor = CallInterceptor(OWN, gate(ends), {OPEN}, trailer=lambda: (("x-load", "7"),))
    async with serving(interceptor) as channel:
        for kind in KINDS:
            method: Callable[..., Any] = getattr(channel, kind)(f"/{OWN}/{kind}")
            call = method(iter([b"x"]) if kind.startswith("stream") else b"x", metadata=AUTHORIZED, timeout=20)
            _ = await call if kind.endswith("unary") else [response async for response in call]
            assert ("x-load", "7") in tuple(await call.trailing_metadata())
        for path, metadata in ((f"/{OWN}/unary_unary", None), (f"/{OWN}/Fails", AUTHORIZED)):
            refused = await called(channel, path, metadata=metadata)
            assert isinstance(refused, grpc.aio.AioRpcError)
            assert "x-load" not in dict(refused.trailing_metadata())


@pytest.fixture
async def health_port() -> AsyncIterator[grpc.aio.Channel]:
    async with serving(OpenInterceptor({HEALTH})) as channel:
        yield channel


async def called(
    channel: grpc.aio.Channel, path: str, kind: str = "unary_unary", *, metadata: Any = None, data: bytes = b"x"
) -> bytes | grpc.aio.AioRpcError:
    """What a call has brought: its one response, or its error."""
    method: Callable[..., Any] = getattr(channel, kind)(path)
    call = method(iter([data]) if kind.startswith("stream") else data, metadata=metadata, timeout=20)
    try:
        if kind.endswith("unary"):
            return bytes(await call)
        return b"".join([response async for response in call])
    except grpc.aio.AioRpcError as error:
        return error


async def code_of(*arguments: Any, **options: Any) -> Code:
    found = await called(*arguments, **options)
    return found.code() if isinstance(found, grpc.aio.AioRpcError) else Code.OK


def error_info(error: object) -> error_details_pb2.ErrorInfo:
    assert isinstance(error, grpc.aio.AioRpcError)
    metadata: Any = dict(error.trailing_metadata())
    (detail,) = status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    return info


# ---- who may call what ----


@pytest.mark.parametrize(("service", "kind"), [*itertools.product((OWN, FOREIGN), KINDS)])
async def test_every_kind_of_method_of_every_service_is_guarded(
    guarded: grpc.aio.Channel, ends: Ends, service: str, kind: str
) -> None:
    path, name = f"/{service}/{kind}", kind if service == OWN else f"{service}/{kind}"
    error = await called(guarded, path, kind)
    assert error_info(error).reason == "UNAUTHENTICATED"
    assert await ends.next() == (name, "UNAUTHENTICATED", "")
    assert await called(guarded, path, kind, metadata=AUTHORIZED) == b"x"
    assert await ends.next() == (name, "OK", "somebody")


@pytest.mark.parametrize("kind", KINDS)
async def test_an_open_service_needs_nothing_and_is_not_logged(
    guarded: grpc.aio.Channel, ends: Ends, kind: str
) -> None:
    assert await called(guarded, f"/{OPEN}/{kind}", kind) == b"x"
    await called(guarded, f"/{OWN}/{kind}", kind)
    assert await ends.next() == (kind, "UNAUTHENTICATED", "")
    assert ends.none


@pytest.mark.parametrize(
    "path", ["/own.v1.Own/canary", "/canary.v1.Canary/Call", "/canary", "//own.v1.Own/unary_unary"]
)
async def test_what_does_not_exist_is_found_out_by_no_stranger(
    guarded: grpc.aio.Channel, ends: Ends, path: str
) -> None:
    assert await code_of(guarded, path) is Code.UNAUTHENTICATED
    error = await called(guarded, path, metadata=AUTHORIZED)
    assert isinstance(error, grpc.aio.AioRpcError)
    assert (error.code(), error_info(error).reason) == (Code.UNIMPLEMENTED, "METHOD_NOT_FOUND")
    assert "canary" not in str(error.details())
    assert await ends.next() == (UNKNOWN_METHOD, "UNAUTHENTICATED", "")
    assert await ends.next() == (UNKNOWN_METHOD, "UNIMPLEMENTED", "somebody")


async def test_names_that_look_like_an_open_service_are_guarded(guarded: grpc.aio.Channel) -> None:
    for service in (f"{HEALTH}2", f"x/{HEALTH}", f"{HEALTH}/Check", HEALTH.lower(), ""):
        assert await code_of(guarded, f"/{service}/Check") is Code.UNAUTHENTICATED, service


async def test_the_health_port_has_health_alone(health_port: grpc.aio.Channel) -> None:
    assert await code_of(health_port, f"/{HEALTH}/Check", data=b"") is Code.OK
    for path in (f"/{OWN}/unary_unary", f"/{OPEN}/unary_unary", f"/{HEALTH}/Other", "/canary"):
        assert await code_of(health_port, path, metadata=AUTHORIZED) is Code.UNIMPLEMENTED, path


# ---- methods that raise ----


async def test_a_guarded_methods_own_end_is_what_is_logged(
    guarded: grpc.aio.Channel, ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    for method, code in (("Fails", Code.INTERNAL), ("Missing", Code.UNIMPLEMENTED), ("Aborts", Code.DATA_LOSS)):
        assert await code_of(guarded, f"/{FOREIGN}/{method}", metadata=AUTHORIZED) is code
        assert await ends.next() == (f"{FOREIGN}/{method}", code.name, "somebody")
    assert [record.getMessage() for record in caplog.records] == [f"{FOREIGN}/Fails failed"]


HEALTH_INPUTS = [
    b"",
    b"\xff",
    b"\x0a\x01\xff",
    health_pb2.HealthCheckRequest(service="canary" * 1000).SerializeToString(),
]
REFLECTION_NAMES = (
    "file_by_filename", "file_containing_symbol", "all_extension_numbers_of_type", "list_services", "host"
)  # fmt: skip
REFLECTION_FIELDS: list[dict[str, Any]] = [
    {},
    *({name: text} for name in REFLECTION_NAMES for text in ("", "canary", ".canary..", "\0", "ü" * 1000)),
    {"all_extension_numbers_of_type": "grpc.health.v1.HealthCheckRequest"},
    {"file_containing_extension": {"containing_type": "canary", "extension_number": -1}},
    {"file_containing_extension": {"containing_type": "google.protobuf.FieldOptions", "extension_number": 2**31 - 1}},
]
REFLECTION_INPUTS = [
    b"\xff",
    *(reflection_pb2.ServerReflectionRequest(**fields).SerializeToString() for fields in REFLECTION_FIELDS),
]


class Posts(AlertHandler):
    """Keeps what an alert would be sent about."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9/", "json", "server")  # never started
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@pytest.fixture
def alerts() -> Iterator[list[str]]:
    handler = Posts()
    logging.getLogger().addHandler(handler)
    yield handler.found
    logging.getLogger().removeHandler(handler)


async def test_no_input_of_a_stranger_is_an_error_in_the_log_or_an_alert(
    guarded: grpc.aio.Channel, health_port: grpc.aio.Channel, alerts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    inputs = [(f"/{HEALTH}/{method}", data) for method in ("Check", "List", "Other") for data in HEALTH_INPUTS]
    for channel, (path, data) in itertools.product((guarded, health_port), inputs):
        await called(channel, path, data=data)
    for data in HEALTH_INPUTS:
        for channel in (guarded, health_port):
            watch_method: Any = channel.unary_stream(f"/{HEALTH}/Watch")
            watch = watch_method(data, timeout=20)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await watch.read()
            watch.cancel()
    path = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
    for data in REFLECTION_INPUTS:
        await called(guarded, path, "stream_stream", data=data)
    for method in ("Fails", "Missing", "Aborts"):
        await called(guarded, f"/{OPEN}/{method}")
    assert alerts == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "Traceback" not in caplog.text
    assert "canary" not in caplog.text


async def test_list_is_the_same_however_much_was_asked_for(guarded: grpc.aio.Channel) -> None:
    first = await called(guarded, f"/{HEALTH}/List", data=b"")
    if isinstance(first, grpc.aio.AioRpcError):
        assert first.code() is Code.UNIMPLEMENTED  # of a grpcio-health-checking that doesn't have it
    for number in range(10):
        request = health_pb2.HealthCheckRequest(service=str(number)).SerializeToString()
        await code_of(guarded, f"/{HEALTH}/Check", data=request)
    assert str(await called(guarded, f"/{HEALTH}/List", data=b"")) == str(first)


# ---- a caller's name of a call ----


@pytest.mark.parametrize(
    ("sent", "expected"),
    [("a-1", "a-1"), ("x" * 64, "x" * 64), ("two words!", "two words!"), ("x" * 65, ""), ("", "")],
)
async def test_the_callers_name_of_a_call_comes_back_with_every_refusal(
    guarded: grpc.aio.Channel, ends: Ends, sent: str, expected: str
) -> None:
    named = (("x-request-id", sent),)
    for metadata, path in ((named, f"/{OWN}/unary_unary"), (named + AUTHORIZED, f"/{OWN}/Fails")):
        info = error_info(await called(guarded, path, metadata=metadata))
        assert dict(info.metadata) == ({"request_id": expected} if expected else {})
        assert (await ends.call()).request_id == expected
    info = error_info(await called(guarded, f"/{OPEN}/Fails", metadata=named))
    assert info.metadata.get("request_id", "") == expected


async def test_a_response_is_written_to_its_end_before_a_cancelled_call_ends() -> None:
    """Behind a message that it is still writing, grpc.aio can send no status."""
    writing, go_on, written = asyncio.Event(), asyncio.Event(), []

    class SlowContext:
        async def read(self) -> bytes:
            return b"request"

        async def write(self, response: bytes) -> None:
            writing.set()
            await go_on.wait()
            written.append(response)

    async def responses(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield b"second"

    method = from_bytes(grpc.unary_stream_rpc_method_handler(responses))
    call = asyncio.ensure_future(method(None, SlowContext()))
    async with asyncio.timeout(20):
        await writing.wait()
        call.cancel()
        await asyncio.sleep(0)
        assert not call.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert written == [b"first"]


# ---- a service that comes later -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving_later(ends: Ends) -> AsyncIterator[tuple[LateService, grpc.aio.Channel]]:
    """A server whose service has the methods of `services`, and isn't there yet."""
    late = LateService(OWN, [*KINDS, "Fails"])
    server = grpc.aio.server(interceptors=[CallInterceptor(OWN, gate(ends))])
    server.add_generic_rpc_handlers((late,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield late, channel
    await server.stop(0)


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_of_a_service_that_is_not_there_yet_come_again(ends: Ends, kind: str) -> None:
    async with serving_later(ends) as (late, channel):
        for _ in range(2):
            error = await called(channel, f"/{OWN}/{kind}", kind, metadata=AUTHORIZED)
            assert isinstance(error, grpc.aio.AioRpcError)
            assert (error.code(), error_info(error).reason) == (Code.UNAVAILABLE, "MODEL_LOADING")
            pushback: Any = dict(error.trailing_metadata())
            assert pushback["grpc-retry-pushback-ms"] == str(RETRY_AFTER_MS)
            call = await ends.call()
            assert (call.method, call.code, call.reason) == (kind, "UNAVAILABLE", "MODEL_LOADING")
        late.add_generic_rpc_handlers([services()[0]])
        assert await called(channel, f"/{OWN}/{kind}", kind, metadata=AUTHORIZED) == b"x"


async def test_before_a_service_is_there_its_methods_are_guarded_and_others_unknown(ends: Ends) -> None:
    async with serving_later(ends) as (_, channel):
        assert error_info(await called(channel, f"/{OWN}/unary_unary")).reason == "UNAUTHENTICATED"
        unknown = await called(channel, f"/{OWN}/Other", metadata=AUTHORIZED)
        assert error_info(unknown).reason == "METHOD_NOT_FOUND"
