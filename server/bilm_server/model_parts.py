"""The parts of a server that need its model: imported, which loads torch, and built behind the open port."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc
import torch
from bilm_api.constants import Priority
from bilm_api.v1 import embed_pb2_grpc
from bilm_model.kernels.fallbacks import fallback_counts
from bilm_model.tokenization.deferred import DeferredTokenizer

from bilm_server.config import ServerConfig
from bilm_server.embedding.admission import Admission, StreamAdmission
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.embedding.conversions import Conversions
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.preprocessing import RequestLimits
from bilm_server.inference.load import LoadMeter
from bilm_server.inference.types import RoundReport
from bilm_server.inference.watchdog import Watchdog
from bilm_server.inference.worker import InferenceWorker
from bilm_server.lifecycle import LoadedParts
from bilm_server.observability.metrics import Metrics
from bilm_server.observability.resources import Gpu, find_gpu
from bilm_server.observability.server_metrics import EngineView
from bilm_server.protocols.embed_v1.service import EmbedService
from bilm_server.protocols.grpc.late_service import LateService
from bilm_server.protocols.kserve.methods import MODEL_METHODS, handler_of
from bilm_server.protocols.kserve.service import InferenceService
from bilm_server.served_model import ServedModel

if TYPE_CHECKING:  # uvicorn is an extra
    from bilm_server.protocols.http.routing import HttpApp


@dataclass(frozen=True, eq=False)
class SharedParts:
    """What is there before the model, and used with it.

    Attributes:
        conversions: threads for what would hold the event loop.
        admission: of calls.
        stream_admission: of streams' items.
        caller_limits: of each caller by itself.
        metrics: count rounds.
        set_health: takes whether the engine works.
        service: where calls come in.
        load: measures how much the engine works; None: nothing asks.
        kserve: where calls of the Open Inference Protocol come in; None: nowhere.
        http: where those over HTTP do; None: nowhere.
    """

    conversions: Conversions
    admission: Admission
    stream_admission: StreamAdmission
    caller_limits: CallerLimits
    metrics: Metrics
    set_health: Callable[[bool], None]
    service: LateService
    load: LoadMeter | None
    kserve: LateService | None
    http: "HttpApp | None"


def build_parts(config: ServerConfig, model: ServedModel, shared: SharedParts) -> LoadedParts:
    """Return what serves a model; nothing of it has started."""
    worker = InferenceWorker(model.engine, _round_observer(model, shared), batch_share=config.batch_share)
    embedder = Embedder(
        model=model,
        worker=worker,
        limits=RequestLimits.of(config),
        conversions=shared.conversions,
        admission=shared.admission,
        stream_admission=shared.stream_admission,
        caller_limits=shared.caller_limits,
    )
    tokenizer = model.tokenizer
    return LoadedParts(
        embedder,
        Watchdog(worker, config.hang_s, config.give_up_s, shared.set_health),
        open=lambda: _open(config, embedder, shared),
        later=tokenizer.load if isinstance(tokenizer, DeferredTokenizer) else lambda: None,
    )


def _round_observer(model: ServedModel, shared: SharedParts) -> Callable[[RoundReport], None]:
    metrics, load, max_rows = shared.metrics, shared.load, model.engine.capacity.rows

    def observe(report: RoundReport) -> None:
        metrics.round(model.name, report.rows, report.failed)
        if load is not None:
            load.add(report, max_rows, time.monotonic())

    return observe


def _open(config: ServerConfig, embedder: Embedder, shared: SharedParts) -> None:
    """Let calls reach an embedder."""
    service = EmbedService(embedder, config.stream_stall_s)
    embed_pb2_grpc.add_EmbedServiceServicer_to_server(service, cast("grpc.aio.Server", shared.service))
    if shared.kserve is not None:
        handler = handler_of(InferenceService(embedder), MODEL_METHODS)
        shared.kserve.add_generic_rpc_handlers((handler,))
    if shared.http is not None:
        from bilm_server.protocols.http.endpoints import endpoints_of  # noqa: PLC0415 - only where HTTP is on

        shared.http.open(endpoints_of(embedder))


def engine_view(parts: LoadedParts) -> EngineView:
    """Return what the metrics read of a model's engine."""
    model, worker, watchdog = parts.embedder.model, parts.embedder.worker, parts.watchdog
    engine = model.engine
    return EngineView(
        model=_labels(model),
        kernel_paths=lambda: engine.description.paths,
        fallbacks=fallback_counts,  # kernels are the process's, and so every model's
        max_rows=engine.capacity.rows,
        stalled_s=lambda: watchdog.stalled_s,
        rows=lambda: worker.rows,
        waiting_sentences=lambda: worker.waiting,
        waiting_by_priority=lambda: {priority.value: worker.waiting_of(priority) for priority in Priority},
        rows_by_priority=lambda: {priority.value: worker.rows_of(priority) for priority in Priority},
        cache=lambda: (engine.stats.cache.hits, engine.stats.cache.misses),
        ticks=lambda: engine.stats.ticks,
    )


def model_gpu(model: ServedModel) -> Gpu | None:
    """Return the GPU that a model computes on; None: a CPU does."""
    device = torch.device(model.engine.description.device)
    return find_gpu(str(torch.cuda.get_device_properties(device).uuid)) if device.type == "cuda" else None


def _labels(model: ServedModel) -> dict[str, str]:
    return {
        "name": model.name,
        "version": model.version,
        "precision": model.precision,
        "backend": model.engine.description.backend,
        "tokenizer": model.tokenizer.name,
    }
