"""`bilm-serve --check-config`: whether a server would start with a configuration, and what memory it would take.

No port is opened and no weight is read, so it takes a second or two and can run beside a server: of a model the files,
the options and the shapes are checked, and neither its numbers nor whether the input cache is large enough for a round.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bilm_model.device import resolve_device
from bilm_model.engine import host_ring, state_transfer
from bilm_model.errors import ModelError
from bilm_system.control_groups import memory_limit_bytes
from bilm_system.files import message, reason

from bilm_server.addresses import socket_path
from bilm_server.config import ServerConfig
from bilm_server.embedding.model_set import check_memory
from bilm_server.errors import ConfigurationError
from bilm_server.preflight import ModelPlan, ServingPlan, plan_serving
from bilm_server.protocols.grpc.connections import connection_limit, http_share
from bilm_server.protocols.grpc.listening import credentials
from bilm_server.protocols.grpc.unix_sockets import check_kinds
from bilm_server.security.auth import Authenticator
from bilm_server.served_model import engine_options

_MIB = 2**20
_PROCESS_BYTES = 600 * _MIB  # Python, torch, compiled kernels and what compiling them leaves behind
_CONNECTION_BYTES, _TLS_CONNECTION_BYTES = 20 * 1024, 60 * 1024
_UNREAD_STREAM_BYTES = 256 * 1024 + _MIB  # what was sent on it, and one result message
_HTTP_BODIES_BYTES = 64 * _MIB  # `protocols.http.bodies`, which may lack what it needs here
_FLOAT_BYTES = 4
_PINNED_BYTES = 2 * (host_ring.MAX_BYTES + state_transfer.MAX_BYTES)  # torch keeps what they grew out of


@dataclass(frozen=True)
class MemorySum:
    """What a server takes at most, by the formula of docs/configuration.md.

    Attributes:
        parts: name and bytes.
        limit: bytes that the process may have.
    """

    parts: tuple[tuple[str, int], ...]
    limit: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(n_bytes for _, n_bytes in self.parts)

    def lines(self) -> Iterator[str]:
        """Yield the sum as text, a part a line, in MiB."""
        for name, n_bytes in (*self.parts, ("sum", self.total), ("limit (control group or machine)", self.limit)):
            yield f"{n_bytes / _MIB:12,.0f} MiB  {name}"
        yield f"{_UNREAD_STREAM_BYTES / _MIB:12,.2f} MiB  more for each stream that is open and not read"
        if self.total > self.limit:
            yield "warning: the sum is more than the limit"


def check(config: ServerConfig) -> tuple[list[str], list[str]]:
    """Check a configuration and everything that it names.

    Returns:
        What is wrong, a line each; and what to show: the model and the memory, if they could be found out.
    """
    errors: list[str] = []

    def checked(do: Callable[[], object]) -> object:
        try:
            return do()
        except (ConfigurationError, ModelError) as error:
            errors.extend(str(error).splitlines())
        except OSError as error:
            errors.append(f"{error.filename}: {error.strerror}")
        return None

    for step in (
        lambda: resolve_device(config.device),
        lambda: Authenticator(config.token_file).load(),
        lambda: credentials(config),
        lambda: _check_extras(config),
        lambda: _check_paths(config),
    ):
        checked(step)
    n_connections = checked(lambda: _connections(config))
    plan = checked(lambda: plan_serving(config))
    if not isinstance(plan, ServingPlan) or errors:
        return errors, []
    assert isinstance(n_connections, int)  # noqa: S101 - there was no error
    models = [*plan.models.values()]
    checked(lambda: check_memory(models, (), memory_limit_bytes()))
    return errors, [*_model_lines(plan), *memory_sum(config, models, n_connections).lines()]


def memory_sum(
    config: ServerConfig, models: Sequence[ModelPlan], n_connections: int, device: torch.device | None = None
) -> MemorySum:
    """Return what a server takes at most.

    Args:
        config: the server's.
        models: that it serves.
        n_connections: open at a time.
        device: where it computes; None: on the one that the configuration names.
    """
    device = device or resolve_device(config.device)
    of_models = [part for model in models for part in _parts_of(model, device, named=len(models) > 1)]
    connection = _CONNECTION_BYTES if config.tls_cert is None else _TLS_CONNECTION_BYTES
    pinned = [(f"results on their way from {device}", _PINNED_BYTES)] if device.type == "cuda" else []
    answers_mib = 2 * (config.max_waiting_mib + config.max_stream_mib)
    return MemorySum(
        (
            ("Python, torch and compiled kernels", _PROCESS_BYTES),
            *of_models,
            *pinned,
            ("answers that wait to be sent, twice", answers_mib * _MIB),
            (f"{n_connections} connections", n_connections * connection),
            *((("bodies of HTTP requests that arrive", _HTTP_BODIES_BYTES),) if config.http_listen else ()),
        ),
        memory_limit_bytes(),
    )


def _parts_of(model: ModelPlan, device: torch.device, *, named: bool) -> Iterator[tuple[str, int]]:
    """Yield what one model takes, with its name where there are others."""
    options, header = engine_options(model.config).resolved(device), model.header
    before, place = f"{model.name}: " if named else "", f"on {device}" if device.type == "cuda" else "in memory"
    parameters = _FLOAT_BYTES * header.parameter_count
    yield f"{before}parameters {place}; as much again in memory while they load", parameters
    in_flight = options.memory_bytes(header.config, device)
    yield f"{before}sentences in flight and the token cache, {place}", in_flight
    yield f"{before}names of the tokens in the cache", options.name_bytes(header.config)
    yield f"{before}the input cache, {place}", options.input_cache_bytes


def _model_lines(plan: ServingPlan) -> Iterator[str]:
    for name in plan.names:
        if (ensemble := plan.ensembles.get(name)) is not None:
            yield f"ensemble {name}: of {', '.join(ensemble.members)}"
            continue
        header = plan.models[name].header
        layers, width = header.config.layer_count, header.config.width
        yield f"model {name}: {layers} layers of {width} numbers, {header.parameter_count:,} parameters"


def _connections(config: ServerConfig) -> int:
    found = connection_limit(config.max_connections)
    if config.http_listen:
        http_share(found)
    return found


def _check_extras(config: ServerConfig) -> None:
    if config.trace_endpoint:
        import bilm_server.observability.tracing  # noqa: PLC0415 - says what is missing
    if config.http_listen:
        import bilm_server.protocols.http.door  # noqa: F401, PLC0415 - likewise


def _check_paths(config: ServerConfig) -> None:
    """Raise ConfigurationError for paths that can't be written or listened on."""
    targets = {"listen": config.listen, "health_listen": config.health_listen}
    sockets = {name: socket_path(target) for name, target in targets.items() if target.startswith("unix:")}
    paths = sockets if config.test_log is None else {**sockets, "test_log": config.test_log}
    problems = {name: _problem(path) for name, path in paths.items()}
    problems |= {name: _kind_problem(path) for name, path in sockets.items() if not problems[name]}
    if lines := [f"{name}: {problem}" for name, problem in problems.items() if problem]:
        raise ConfigurationError("\n".join(lines))


def _kind_problem(path: Path) -> str:
    try:
        check_kinds(path)
    except OSError as error:
        return message(error)
    return ""


def _problem(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{folder}: no such folder"
    try:
        path.stat()
    except FileNotFoundError:
        pass  # it will be made
    except (OSError, ValueError) as error:
        return f"{path}: {reason(error)}"
    if path.is_dir() or (path.is_file() and not os.access(path, os.W_OK)) or not os.access(folder, os.W_OK | os.X_OK):
        return f"{path}: can't be written"
    return ""
