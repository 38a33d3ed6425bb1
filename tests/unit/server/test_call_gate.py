"""The gate that every call passes, whatever its protocol; no grpc here."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from bilm_api.constants import NO_LOG_KEY, Priority, Reason
from bilm_server.config import CallerSettings, Right
from bilm_server.embedding.call_gate import CallGate
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.errors import Code, RefusalError
from bilm_server.observability.call_record import CallRecord, current_call
from bilm_server.security.auth import Caller
from bilm_server.security.callers import CallerRights

MARKED = ((NO_LOG_KEY, "1"),)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Names:
    """Names each caller as its peer does; a peer "?" is known to nobody."""

    def identify(self, metadata: Any, peer: str, auth_context: Mapping[str, Any]) -> Caller:
        if peer == "?":
            raise RefusalError(Reason.UNAUTHENTICATED, "the token isn't known")
        return Caller(f"{peer}{len(auth_context) or ''}")


class Observer:
    """Keeps what it sees of calls."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Code | None, str]] = []

    def begin(self, call: CallRecord) -> None:
        self.seen.append(("begin", call.caller, call.code, call.reason))

    def end(self, call: CallRecord) -> None:
        self.seen.append(("end", call.caller, call.code, call.reason))


@pytest.fixture
def observer() -> Observer:
    return Observer()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(observer: Observer, clock: Clock) -> CallGate:
    callers = [
        CallerSettings(name="team-a", rights=frozenset({Right.NO_LOG})),
        CallerSettings(name="nightly", max_priority=Priority.BATCH),
    ]
    rights = CallerRights(callers, authenticated=True)
    limits = CallerLimits(0, 1, 100, clock=clock)
    return CallGate(Names(), rights, limits, [observer], clock=clock)


def test_a_call_is_observed_from_begin_to_end(gate: CallGate, observer: Observer, clock: Clock) -> None:
    call = CallRecord("Embed", "team-a")
    with gate.call(call):
        assert current_call() is call
        clock.now_s += 2.5
    assert observer.seen == [("begin", "", None, ""), ("end", "team-a", Code.OK, "")]
    assert call.duration_s == 2.5
    with pytest.raises(LookupError):
        current_call()


def test_who_is_not_known_is_refused_before_anything_is_done(gate: CallGate, observer: Observer) -> None:
    with pytest.raises(RefusalError), gate.call(CallRecord("Embed", "?")):
        pytest.fail("the call was let in")
    assert observer.seen[-1] == ("end", "", Code.UNAUTHENTICATED, "UNAUTHENTICATED")


def test_what_the_connection_proves_names_the_caller(gate: CallGate) -> None:
    with gate.call(call := CallRecord("Embed", "certificate"), {"x509_common_name": [b"team-a"]}):
        assert call.caller == "certificate1"


def test_a_caller_may_have_so_many_calls_at_a_time(gate: CallGate, observer: Observer) -> None:
    with gate.call(CallRecord("Embed", "team-a")):
        with pytest.raises(RefusalError) as refusal, gate.call(CallRecord("Embed", "team-a")):
            pytest.fail("the call was let in")
        assert refusal.value.reason is Reason.CALLER_LIMIT
        with gate.call(CallRecord("Embed", "team-b")):
            pass
    with gate.call(CallRecord("Embed", "team-a")):
        pass
    assert ("end", "team-a", Code.RESOURCE_EXHAUSTED, "CALLER_LIMIT") in observer.seen


def test_a_door_may_hold_a_calls_place_for_longer_than_the_call(gate: CallGate) -> None:
    first = CallRecord("Embed", "team-a")
    with gate.call(first, keeps_held=True):
        pass
    with pytest.raises(RefusalError), gate.call(CallRecord("Embed", "team-a")):
        pytest.fail("the call was let in")
    first.held.close()
    with gate.call(CallRecord("Embed", "team-a")):
        pass


@pytest.mark.parametrize(("caller", "expected"), [("team-a", True), ("team-b", False)])
def test_only_callers_with_the_right_keep_calls_out_of_the_log(gate: CallGate, caller: str, expected: bool) -> None:
    with gate.call(call := CallRecord("Embed", caller, MARKED)):
        assert call.is_test is expected


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (RefusalError(Reason.OVERLOADED, "later"), Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (asyncio.CancelledError(), Code.CANCELLED, ""),
        (KeyError("x"), Code.UNKNOWN, ""),
    ],
)
def test_an_error_is_how_the_call_ends(
    gate: CallGate, observer: Observer, error: BaseException, code: Code, reason: str
) -> None:
    with pytest.raises(type(error)), gate.call(CallRecord("Embed", "team-a")):
        raise error
    assert observer.seen[-1] == ("end", "team-a", code, reason)


def test_a_code_that_the_door_has_set_stays(gate: CallGate) -> None:
    call = CallRecord("Embed", "team-a")

    def end_late() -> None:
        call.code = Code.DEADLINE_EXCEEDED
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError), gate.call(call):
        end_late()
    assert call.code is Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize(("name", "expected"), [("nightly", Priority.BATCH), ("team-a", Priority.INTERACTIVE)])
def test_a_call_has_its_callers_ceiling(gate: CallGate, name: str, expected: Priority) -> None:
    call = CallRecord("Embed", name)
    with gate.call(call):
        assert call.priority is expected
