"""`bilm-serve`: reads the configuration, listens, loads the model, serves until it is stopped."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from bilm_model.errors import ModelError
from bilm_model.torch_libraries import open_libraries
from bilm_system.allocation import bound_arenas, bound_product_kernels
from bilm_system.files import reason
from bilm_system.openmp import bound_spinning
from bilm_system.terminal import run_command

from bilm_server.app import build_server
from bilm_server.config import ServerConfig
from bilm_server.config_sources import load_config
from bilm_server.errors import BindError, ConfigurationError, EngineLostError
from bilm_server.lifecycle import Server
from bilm_server.log_levels import parse_levels
from bilm_server.observability.alerts import AlertHandler
from bilm_server.observability.log_setup import Logs, configure_logs
from bilm_server.observability.server_metrics import DropCounts
from bilm_server.preflight import plan_serving

if TYPE_CHECKING:
    from bilm_server.served_model import ServedModel

    LoadModel = Callable[[ServerConfig], ServedModel]

_log = logging.getLogger(__name__)

_ENGINE_LOST = 3

_SWITCH_INTERVAL_S = 0.0005
"""The event loop lets the interpreter go at each bit of input and output, and waits so long to have it back while the
engine plans a round: by the default, 5 ms, a health check beside full load took ten times as long."""


def load_model(config: ServerConfig) -> "ServedModel":
    """Load the model that the configuration names; in a thread that ends, see `load_served_model`."""
    bound_spinning(os.environ)
    bound_product_kernels(os.environ)
    open_libraries()
    from bilm_server.served_model import load_served_model  # noqa: PLC0415 - it loads torch

    return load_served_model(config)


def main(argv: list[str] | None = None, load: "LoadModel" = load_model) -> int:
    """Run the server.

    Args:
        argv: flags; None: those of the process.
        load: loads the model.

    Returns:
        0 after SIGTERM or SIGINT, or if --check-config found nothing wrong; 1 if it couldn't start, 2 for a bad
        configuration, 3 if the engine was lost.
    """
    bound_arenas(os.environ)
    return run_command("bilm-serve", partial(_main, sys.argv[1:] if argv is None else argv, load))


def _main(argv: list[str], load: "LoadModel") -> int:
    try:
        config = load_config(argv)
    except ConfigurationError as error:
        for line in str(error).splitlines():
            print(f"bilm-serve: {line}", file=sys.stderr)
        return 2
    if config.check_config:
        return _check(config)
    try:
        logs = configure_logs(config.log_level, config.log_format, parse_levels(config.loggers), config.test_log)
    except (OSError, ValueError) as error:
        print(f"bilm-serve: test_log: {config.test_log}: {reason(error)}", file=sys.stderr)
        return 2
    return _serve(config, logs, load, partial(load_config, argv))


def _check(config: ServerConfig) -> int:
    from bilm_server.checking import check  # noqa: PLC0415 - it loads torch

    errors, lines = check(config)
    for line in errors:
        print(f"bilm-serve: {line}", file=sys.stderr)
    for line in lines:
        print(line)
    return 2 if errors else 0


def _serve(config: ServerConfig, logs: Logs, load: "LoadModel", read_config: Callable[[], ServerConfig]) -> int:
    alerts = _start_alerts(config)
    # Until the event loop takes over: process 1 of a container gets only those signals that it handles
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nothing is there yet that could be reloaded
    try:
        drops = DropCounts(lambda: logs.dropped, lambda: alerts.dropped if alerts else 0)
        still_loading = asyncio.run(_run(config, load, drops, read_config))
    except (BindError, ConfigurationError, ModelError) as error:
        logs.flush()
        for line in str(error).splitlines():
            print(f"bilm-serve: {line}", file=sys.stderr)
        return exit_code(error)
    if still_loading:
        logging.shutdown()
        os._exit(0)  # an interpreter that ends while a thread imports torch may crash
    return 0


def exit_code(error: BindError | ConfigurationError | ModelError) -> int:
    """Return the exit code for what kept the server from starting.

    Returns:
        2, so that no supervisor tries again, where a setting names a file that can't be used (closed to this user, a
        folder, a device); 1 for all else. A file that is missing is 1: its file system may be mounted later.
    """
    cause = error.__cause__
    unusable = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return 2 if unusable and not isinstance(error, BindError) else 1


def _start_alerts(config: ServerConfig) -> AlertHandler | None:
    if not config.alert_url:
        return None
    alerts = AlertHandler(config.alert_url, config.alert_format, f"{socket.gethostname()} {config.listen}")
    logging.getLogger().addHandler(alerts)
    alerts.start()
    return alerts


async def _run(
    config: ServerConfig, load: "LoadModel", drops: DropCounts, read_config: Callable[[], ServerConfig]
) -> bool:
    """Run a server from start to stop; return whether a thread still loads a model."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    server = build_server(config, plan_serving(config), partial(_load, load), drops, read_config)
    _heed_signals(server)
    try:
        await server.start()
        await server.load()
        await server.serve()
        await server.drain()
    except EngineLostError as error:
        _log.critical("%s; the process ends, so that its supervisor starts another", error)
        logging.shutdown()
        os._exit(_ENGINE_LOST)  # nothing orderly: a thread that hangs inside the model would be waited for
    finally:
        await server.stop()
    return server.loading


def _load(load: "LoadModel", config: ServerConfig) -> "ServedModel":
    model = load(config)
    _log.info(
        "model %s, version %s, %s, %s, tokenizer %s",
        model.name, model.version, model.precision, model.engine.description.backend, model.tokenizer.name,
    )  # fmt: skip
    if model.engine.description.paths["products"].startswith("rounded"):
        _log.warning(
            "bfloat16 products aren't native here: they are computed in float32 from rounded factors, which takes the "
            "memory of float32 and may be slower than --precision float32"
        )
    return model


def _heed_signals(server: Server) -> None:
    """The first SIGTERM or SIGINT drains, a second one ends the process as it would without us; SIGHUP reloads."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        loop.remove_signal_handler(number)
        server.ask_to_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # on Windows
            loop.add_signal_handler(number, stop, number)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        loop.add_signal_handler(signal.SIGHUP, server.ask_to_reload)
