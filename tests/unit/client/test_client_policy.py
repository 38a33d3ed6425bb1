"""Retry policy and keepalive."""

import json
from typing import Any

import grpc
import pytest
from bilm_client import Keepalive, RetryPolicy
from bilm_client.errors import ServiceError
from bilm_client.policy import broke_off, is_resumable


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_attempts": 0},
        {"max_attempts": 6},
        {"initial_backoff_s": 0.001},  # gRPC rounds it to 0 ms and hangs the call
        {"max_backoff_s": float("inf")},
        {"backoff_multiplier": 0.5},
        {"throttle_tokens": 1001},
        {"throttle_ratio": 0.0},
    ],
)
def test_a_number_out_of_range_is_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RetryPolicy(**arguments)


@pytest.mark.parametrize("arguments", [{"time_s": 0.0}, {"timeout_s": float("nan")}])
def test_keepalive_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Keepalive(**arguments)


def test_the_service_config_retries_unary_calls_only() -> None:
    config = json.loads(RetryPolicy(max_attempts=4, initial_backoff_s=0.25).service_config())
    [method] = config["methodConfig"]
    assert [name["method"] for name in method["name"]] == ["Embed", "GetModel", "ListModels"]
    assert {name["service"] for name in method["name"]} == {"bilm_api.v1.EmbedService"}
    assert method["retryPolicy"]["maxAttempts"] == 4
    assert method["retryPolicy"]["initialBackoff"] == "0.250000000s"
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
    assert config["retryThrottling"] == {"maxTokens": 100, "tokenRatio": 0.1}


def test_one_attempt_has_no_policy() -> None:
    assert "methodConfig" not in json.loads(RetryPolicy(max_attempts=1).service_config())


def test_backoff_grows_to_its_maximum_with_jitter() -> None:
    policy = RetryPolicy(initial_backoff_s=0.5, max_backoff_s=1.5)
    assert [policy.backoff_s(failures, 0.5) for failures in (1, 2, 3, 4)] == [0.5, 1.0, 1.5, 1.5]
    assert policy.backoff_s(1, 0.0) == pytest.approx(0.4)
    assert policy.backoff_s(1, 1.0) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("code", "message", "reason", "pushback_ms", "expected"),
    [
        ("UNAVAILABLE", "", "", None, True),
        ("UNAVAILABLE", "", "", -1, False),
        ("RESOURCE_EXHAUSTED", "", "", None, False),
        ("RESOURCE_EXHAUSTED", "", "OVERLOADED", 5, True),
        ("RESOURCE_EXHAUSTED", "", "QUOTA", -1, False),
        ("CANCELLED", "", "", None, True),
        ("INTERNAL", "Received RST_STREAM with error code 2", "", None, True),
        ("INTERNAL", "a bug", "INTERNAL_ERROR", None, False),
        ("INVALID_ARGUMENT", "", "", None, False),
        ("DEADLINE_EXCEEDED", "", "", None, False),
    ],
)
def test_what_a_stream_resumes_after(
    code: str, message: str, reason: str, pushback_ms: int | None, expected: bool
) -> None:
    error = ServiceError(message, code=grpc.StatusCode[code], reason=reason, pushback_ms=pushback_ms)
    assert is_resumable(error) is expected


@pytest.mark.parametrize(
    ("code", "reason", "message", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, "", "recvmsg:Connection reset by peer", True),
        (grpc.StatusCode.UNAVAILABLE, "", "failed to connect to all addresses; last error: …", False),
        (
            grpc.StatusCode.UNAVAILABLE,
            "",
            "connections to all backends failing; last error: …: backend unhealthy",
            False,
        ),
        (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", "the server is shutting down", False),
        (grpc.StatusCode.INTERNAL, "", "Received RST_STREAM with error code 2", True),
        (grpc.StatusCode.INTERNAL, "INTERNAL", "internal error", False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", "Deadline Exceeded", False),
    ],
)
def test_which_calls_broke_off(code: grpc.StatusCode, reason: str, message: str, expected: bool) -> None:
    assert broke_off(ServiceError(message, code=code, reason=reason)) is expected
