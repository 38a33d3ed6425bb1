"""How a client behaves towards the network: retry, keepalive and balancing."""

import json
import math
from dataclasses import dataclass
from typing import Literal

import grpc

from bilm_client.errors import ServiceError

Balance = Literal["first", "round_robin", "weighted"]
"""How a client spreads calls over several servers."""

SERVICE_NAME = "bilm_api.v1.EmbedService"
# EmbedStream is missing on purpose: the client resumes streams by itself, and two layers that retry multiply.
RETRIED_METHODS = ("Embed", "GetModel", "ListModels")
# A wait that gRPC rounds to 0 ms hangs the call until its deadline (grpcio 1.85.1: half of the retries at 1 ms).
_MIN_BACKOFF_S = 0.01
# gRPC's words where no server can be reached, or none is SERVING; its own retries were for that.
_NO_SERVER = ("failed to connect", "backend unhealthy")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _check_at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} must be at least {least:g} and finite, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how fast a failed call is tried again.

    Unary calls are retried by gRPC itself, streams are resumed by the client; both follow these numbers. A server's
    pushback takes the place of the backoff. Retries pause while more than half of the `throttle_tokens` are used up:
    every failure takes one, every success gives `throttle_ratio` back.

    Attributes:
        max_attempts: Attempts in all, the first included; 1 to 5 (gRPC's own limit); 1: no retry.
        initial_backoff_s: Wait before the second attempt, ±20 % of jitter; at least 0.01.
        max_backoff_s: Longest wait; at least 0.01.
        backoff_multiplier: Growth of the wait from one attempt to the next; at least 1.
        throttle_tokens: Size of the bucket, above 0, at most 1000.
        throttle_ratio: What a success gives back, above 0.

    Raises:
        ValueError: A number is out of its range; the message names it.
    """

    max_attempts: int = 5
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    backoff_multiplier: float = 2.0
    throttle_tokens: int = 100
    throttle_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= 5:
            raise ValueError(f"max_attempts must be 1 to 5, got {self.max_attempts!r}")
        if not 0 < self.throttle_tokens <= 1000:
            raise ValueError(f"throttle_tokens must be above 0 and at most 1000, got {self.throttle_tokens!r}")
        _check_at_least("initial_backoff_s", self.initial_backoff_s, _MIN_BACKOFF_S)
        _check_at_least("max_backoff_s", self.max_backoff_s, _MIN_BACKOFF_S)
        _check_at_least("backoff_multiplier", self.backoff_multiplier, 1.0)
        _check_positive("throttle_ratio", self.throttle_ratio)

    def service_config(self) -> str:
        """Return the gRPC service config, as JSON: retry of the unary calls of the service, and nothing for Health."""
        config: dict[str, object] = {
            "retryThrottling": {"maxTokens": self.throttle_tokens, "tokenRatio": self.throttle_ratio}
        }
        if self.max_attempts > 1:
            names = [{"service": SERVICE_NAME, "method": method} for method in RETRIED_METHODS]
            config["methodConfig"] = [{"name": names, "retryPolicy": self._grpc_policy()}]
        return json.dumps(config)

    def _grpc_policy(self) -> dict[str, object]:
        return {
            "maxAttempts": self.max_attempts,
            "initialBackoff": f"{self.initial_backoff_s:.9f}s",
            "maxBackoff": f"{self.max_backoff_s:.9f}s",
            "backoffMultiplier": self.backoff_multiplier,
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
        }

    def backoff_s(self, failures: int, uniform: float) -> float:
        """Return the wait in s after the `failures`-th failure in a row (from 1); `uniform` in [0, 1) is the jitter."""
        backoff_s = self.initial_backoff_s * self.backoff_multiplier ** (failures - 1)
        return min(backoff_s, self.max_backoff_s) * (0.8 + 0.4 * uniform)


@dataclass(frozen=True, kw_only=True)
class Keepalive:
    """HTTP/2 pings that keep an idle connection open through balancers and notice a dead one.

    Attributes:
        time_s: Seconds between pings; the server refuses to be pinged more often than every 20 s.
        timeout_s: Seconds to wait for the response before the connection counts as dead.

    Raises:
        ValueError: A number isn't positive and finite.
    """

    time_s: float = 60.0
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        _check_positive("time_s", self.time_s)
        _check_positive("timeout_s", self.timeout_s)


DEFAULT_RETRY = RetryPolicy()
DEFAULT_KEEPALIVE = Keepalive()


def is_resumable(error: ServiceError) -> bool:
    """Return whether a stream that broke with `error` may be resumed on another connection."""
    if error.pushback_ms is not None and error.pushback_ms < 0:
        return False
    match error.code:
        # A peer that resets the stream appears as CANCELLED or INTERNAL, one that resets the connection as UNAVAILABLE.
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return True
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return error.pushback_ms is not None
        case grpc.StatusCode.INTERNAL:
            return not error.reason and "RST_STREAM" in error.message
        case _:
            return False


def broke_off(error: ServiceError) -> bool:
    """Return whether a unary call lost its connection on the way, after gRPC's own retries; not if there was none."""
    return not error.reason and is_resumable(error) and not any(words in error.message for words in _NO_SERVER)
