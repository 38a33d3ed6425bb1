"""`bilm-embed`: by a server, or by a model in this process."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from bilm_client.batch.main import main as embed

if TYPE_CHECKING:  # both need the extra `files`, whose absence the command reports
    from bilm_client.batch.pipeline import NewClient
    from bilm_client.batch.settings import RunSettings

_EXTRAS = ("h5py", "numba", "safetensors", "sacremoses", "torch")


def main(argv: list[str] | None = None) -> int:
    """Embed a file; exit codes are those of `bilm_client.batch.main`."""
    return embed(argv, open_clients)


@contextmanager
def open_clients(settings: "RunSettings") -> Iterator["NewClient"]:
    """Return what makes clients of the model that the settings name.

    Raises:
        UsageError: The model can't be loaded, or the server's credentials can't be used.
    """
    from bilm_client.batch.pipeline import remote_clients  # noqa: PLC0415
    from bilm_client.cli.settings_sources import UsageError  # noqa: PLC0415

    if not settings.computes:
        with remote_clients(settings) as new:
            yield new
        return
    try:
        with _own_clients(settings) as new:
            yield new
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        raise UsageError(f"model: {error.name} is missing: pip install 'bilm-serve[local]'") from error


@contextmanager
def _own_clients(settings: "RunSettings") -> Iterator["NewClient"]:
    from bilm_client._core.settings import Settings  # noqa: PLC0415
    from bilm_client.aio import AsyncTransportClient  # noqa: PLC0415
    from bilm_client.cli.settings_sources import UsageError  # noqa: PLC0415
    from bilm_model.errors import ModelError  # noqa: PLC0415

    from bilm_local.asynchronous import LocalAsyncTransport  # noqa: PLC0415
    from bilm_local.loading import LocalSettings, load_local  # noqa: PLC0415 - loads torch
    from bilm_local.transport import LocalTransport  # noqa: PLC0415

    chosen = LocalSettings(
        path=settings.model,
        options=settings.options,
        device=settings.device,
        precision=settings.precision,
        tokenizer=settings.tokenizer,
        tokenizer_language=settings.tokenizer_language,
    )
    transport = LocalTransport(chosen, load_local)

    def new(_model: str, model_version: str) -> AsyncTransportClient:
        client = Settings(target="this process", expected_model_version=model_version, timeout_s=math.inf)
        return AsyncTransportClient(client, partial(LocalAsyncTransport, transport))

    try:
        yield new
    except ModelError as error:
        raise UsageError(f"model: {error}") from error
    finally:
        transport.close()
