"""The settings of a client, parsed once and passed down, and the deadline of one call."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import grpc
from bilm_api.constants import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES, MODEL_HEALTH

from bilm_client._core.balancing import check_balance, check_server_name, service_config
from bilm_client.errors import DeadlineError, ServiceError, UnavailableError
from bilm_client.policy import DEFAULT_KEEPALIVE, DEFAULT_RETRY, Balance, Keepalive, RetryPolicy

_MIB = 1024 * 1024
# The slack keeps a server that counts a little differently from costing a call.
_MAX_RECEIVE_BYTES = MAX_RESPONSE_BYTES + _MIB
# By gRPC's default of two minutes a client keeps failing long after its server is back.
_MAX_RECONNECT_BACKOFF_MS = 5_000
_SERVICE_CONFIG = "grpc.service_config"


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time on the monotonic clock; `math.inf`: none."""

    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Self:
        """Return the deadline `timeout_s` seconds from now."""
        return cls(time.monotonic() + timeout_s)

    def remaining_s(self) -> float | None:
        """Return the seconds left, as gRPC takes them (None: no deadline).

        Raises:
            DeadlineError: None is left.
        """
        if math.isinf(self.at_s):
            return None
        left_s = self.at_s - time.monotonic()
        if left_s <= 0:
            raise deadline_passed()
        return left_s


def deadline_passed() -> DeadlineError:
    """Return the exception for a call that the client itself ends at its deadline."""
    return DeadlineError("the deadline of the call has passed", code=grpc.StatusCode.DEADLINE_EXCEEDED)


NO_DEADLINE = Deadline(math.inf)


class ResultTimeout:
    """The longest wait for a stream's next message, through breaks and new connections.

    Args:
        timeout_s: From the beginning of the wait for a message to its arrival; None: no limit.
        deadline: The deadline of the stream as a whole.
    """

    def __init__(self, timeout_s: float | None, deadline: Deadline = NO_DEADLINE) -> None:
        self.deadline = deadline
        self._timeout_s = timeout_s
        self._since_s: float | None = None

    def reset(self) -> None:
        """Start over: a message has come, or its result has left."""
        self._since_s = None

    def remaining_s(self) -> float | None:
        """Return the seconds left (None: no limit); a wait begins, unless one is under way.

        Raises:
            DeadlineError: None is left.
        """
        left_s = self.deadline.remaining_s()
        if self._timeout_s is None:
            return left_s
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
        wait_s = self._since_s + self._timeout_s - now_s
        if wait_s <= 0:
            raise DeadlineError(f"no result for {self._timeout_s} s", code=grpc.StatusCode.DEADLINE_EXCEEDED)
        return wait_s if left_s is None else min(left_s, wait_s)

    def call_deadline(self) -> Deadline:
        """Return the deadline of a call that must end before the next message can come.

        Raises:
            DeadlineError: No time is left.
        """
        left_s = self.remaining_s()
        return NO_DEADLINE if left_s is None else Deadline.after(left_s)

    def pause_s(self, wait_s: float, error: ServiceError) -> float:
        """Return the wait before another attempt.

        Raises:
            ServiceError: `error`, where that attempt would come too late.
        """
        left_s = self.remaining_s()
        if left_s is not None and wait_s >= left_s:
            raise error
        return wait_s


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of a client, checked; see `Client` for what they mean."""

    target: str
    balance: Balance = "first"
    model: str = ""
    expected_model_version: str = ""
    timeout_s: float = 60.0
    retry: RetryPolicy = DEFAULT_RETRY
    keepalive: Keepalive = DEFAULT_KEEPALIVE
    credentials: grpc.ChannelCredentials | None = None
    token: str | None = field(default=None, repr=False)
    metadata: Sequence[tuple[str, str | bytes]] = field(default=(), repr=False)
    channel_options: Sequence[tuple[str, Any]] = ()
    proxy: bool = True
    coalesce_ms: float | None = None
    watch_model: bool = True
    """Whether servers are chosen by the health of the model; else by their own."""

    def __post_init__(self) -> None:
        for name in ("target", "model", "expected_model_version"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a str, got {type(getattr(self, name)).__name__}")
        if not self.target:
            raise ValueError("target must be an address such as 'localhost:50051', got ''")
        check_balance(self.balance)
        if self.credentials is not None:
            check_server_name(self.target, self.channel_options)
        self._service_config()
        check_timeout_s(self.timeout_s)
        _check_coalesce_ms(self.coalesce_ms)
        if not isinstance(self.proxy, bool):
            raise TypeError(f"proxy must be a bool, got {self.proxy!r}")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token):
            raise ValueError("token must be printable ASCII and not empty")  # never show the token itself

    @property
    def health_service(self) -> str:
        """Name of what embeds for the client, at the health service: its model, or the server as a whole."""
        return MODEL_HEALTH + self.model if self.model else ""

    @property
    def watches_model(self) -> bool:
        """Whether calls go only to servers on which the client's model is SERVING."""
        return self.watch_model and bool(self.model) and self.balance != "first"

    def may_lack_model(self, error: ServiceError) -> bool:
        """Return whether a call may have failed because no server knows the model's health, let alone the model."""
        return self.watches_model and isinstance(error, UnavailableError) and not error.reason

    def watching_servers(self) -> Self:
        """Return these settings for the health of servers as a whole."""
        return replace(self, watch_model=False)

    @property
    def coalesce_s(self) -> float:
        """Longest wait of a call for others in seconds; 0: none waits."""
        return (self.coalesce_ms or 0.0) / 1000

    def deadline(self, timeout_s: float | None) -> Deadline:
        """Return the deadline of a call that starts now; `timeout_s` None: the client's default."""
        return Deadline.after(self._timeout_or_default_s(timeout_s))

    def result_timeout(self, timeout_s: float | None) -> ResultTimeout:
        """Return the time-out for each result of a stream; `timeout_s` None: the client's default."""
        wait_s = self._timeout_or_default_s(timeout_s)
        return ResultTimeout(None if math.isinf(wait_s) else wait_s)

    def _timeout_or_default_s(self, timeout_s: float | None) -> float:
        if timeout_s is None:
            return self.timeout_s
        check_timeout_s(timeout_s)
        return timeout_s

    def call_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the metadata of every call."""
        bearer = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        return (*bearer, *self.metadata)

    def check_picklable(self) -> None:
        """Check that the settings can be used in another process.

        Raises:
            TypeError: There are credentials, which gRPC keeps in this process.
        """
        if self.credentials is not None:
            raise TypeError(
                "credentials: gRPC's can't be pickled, so this client can't either: pickle what they are made from and "
                "make the client in the other process"
            )

    def channel_arguments(self) -> list[tuple[str, Any]]:
        """Return the arguments of the channel; `channel_options` replace the others, a service config its fields."""
        arguments = {
            "grpc.max_receive_message_length": _MAX_RECEIVE_BYTES,
            "grpc.max_send_message_length": MAX_REQUEST_BYTES,
            "grpc.keepalive_time_ms": round(self.keepalive.time_s * 1000),
            "grpc.keepalive_timeout_ms": round(self.keepalive.timeout_s * 1000),
            "grpc.http2.ping_timeout_ms": round(self.keepalive.timeout_s * 1000),  # else its 60 s decide
            "grpc.keepalive_permit_without_calls": 1,
            "grpc.http2.max_pings_without_data": 0,  # else an idle connection gets two pings and then none
            "grpc.max_reconnect_backoff_ms": _MAX_RECONNECT_BACKOFF_MS,
            "grpc.enable_retries": 1,
            "grpc.per_rpc_retry_buffer_size": MAX_REQUEST_BYTES + _MIB,  # default 256 KiB: larger calls aren't retried
            "grpc.service_config_disable_resolution": 1,
        }
        return list({**arguments, **dict(self.channel_options), _SERVICE_CONFIG: self._service_config()}.items())

    def _service_config(self) -> str:
        watched = self.health_service if self.watch_model else ""
        return service_config(self.retry, self.balance, dict(self.channel_options).get(_SERVICE_CONFIG), watched)


def _check_coalesce_ms(coalesce_ms: float | None) -> None:
    if coalesce_ms is None:
        return
    if isinstance(coalesce_ms, bool) or not isinstance(coalesce_ms, int | float):
        raise TypeError(f"coalesce_ms must be a number of milliseconds or None, got {coalesce_ms!r}")
    if not (math.isfinite(coalesce_ms) and coalesce_ms >= 0):
        raise ValueError(f"coalesce_ms must be at least 0 and finite (0: off), got {coalesce_ms!r}")


def check_timeout_s(timeout_s: float) -> None:
    """Check a number of seconds.

    Raises:
        TypeError: It is no number.
        ValueError: It isn't positive.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise TypeError(f"timeout_s must be a number of seconds, got {timeout_s!r}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive (math.inf: no deadline), got {timeout_s!r}")
