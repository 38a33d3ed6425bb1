"""The parts of a server that need its models: imported, which loads torch, and built behind the open port."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc
import torch
from bilm_api.constants import Priority
from bilm_api.v1 import embed_pb2_grpc
from bilm_model.device import resolve_device
from bilm_model.kernels.fallbacks import fallback_counts
from bilm_model.tokenization.deferred import DeferredTokenizer

from bilm_server.config import ServerConfig
from bilm_server.embedding.admission import Admission, StreamAdmission
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.embedding.conversions import Conversions
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.ensemble import Ensemble, EnsembleWorker, Member
from bilm_server.embedding.model_set import ModelSet, ServingModel
from bilm_server.embedding.preprocessing import RequestLimits
from bilm_server.embedding.registry import Registry
from bilm_server.inference.engine_thread import EngineThread
from bilm_server.inference.load import LoadMeter
from bilm_server.inference.types import RoundReport
from bilm_server.inference.watchdog import Watchdog
from bilm_server.inference.worker import InferenceWorker, Worker
from bilm_server.lifecycle import LoadedParts
from bilm_server.observability.metrics import Metrics
from bilm_server.observability.resources import Gpu, find_gpu
from bilm_server.observability.server_metrics import EngineView
from bilm_server.preflight import ServingPlan
from bilm_server.protocols.embed_v1.service import EmbedService
from bilm_server.protocols.grpc.late_service import LateService
from bilm_server.protocols.kserve.methods import MODEL_METHODS, handler_of
from bilm_server.protocols.kserve.service import InferenceService
from bilm_server.served_model import EmbeddingModel, ServedModel

if TYPE_CHECKING:  # uvicorn is an extra
    from bilm_server.protocols.http.routing import HttpApp


@dataclass(frozen=True, eq=False)
class SharedParts:
    """What is there before the models, and used with them.

    Attributes:
        conversions: threads for what would hold the event loop.
        admission: of calls.
        stream_admission: of streams' items.
        caller_limits: of each caller by itself.
        metrics: count rounds.
        set_health: takes whether each model works.
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
    set_health: Callable[[Mapping[str, bool]], None]
    service: LateService
    load: LoadMeter | None
    kserve: LateService | None
    http: "HttpApp | None"


def build_parts(
    config: ServerConfig, plan: ServingPlan, load: Callable[[ServerConfig], ServedModel], shared: SharedParts
) -> LoadedParts:
    """Load models, and return what serves them; nothing of it has started."""
    limits = RequestLimits.of(config)
    registry, thread = Registry(limits, shared.conversions), EngineThread(batch_share=config.batch_share)

    def embedder_of(model: EmbeddingModel, worker: Worker) -> Embedder:
        return Embedder(
            model=model,
            worker=worker,
            limits=limits,
            conversions=shared.conversions,
            admission=shared.admission,
            stream_admission=shared.stream_admission,
            caller_limits=shared.caller_limits,
        )

    def serve(model: ServedModel, weight: float) -> tuple[Embedder, InferenceWorker]:
        worker = InferenceWorker(
            model.engine, _round_observer(model, shared), batch_share=config.batch_share, thread=thread, weight=weight
        )
        return embedder_of(model, worker), worker

    def serve_ensemble(ensemble: Ensemble, members: Sequence[Member]) -> Embedder:
        return embedder_of(ensemble, EnsembleWorker(members, shared.conversions))

    models = ModelSet(registry, load, serve, serve_ensemble, shared.metrics.add_models, thread=thread)
    loaded = models.load([*plan.models.values()])
    return LoadedParts(
        models,
        lambda: models.start(plan, loaded),
        Watchdog(thread, models.health, config.hang_s, config.give_up_s, shared.set_health),
        open=lambda: _open(config, registry, shared),
        later=lambda: _load_tokenizers(registry),
    )


def _round_observer(model: ServedModel, shared: SharedParts) -> Callable[[RoundReport], None]:
    metrics, load, max_rows = shared.metrics, shared.load, model.engine.capacity.rows

    def observe(report: RoundReport) -> None:
        metrics.round(model.name, report.rows, report.failed)
        if load is not None:
            load.add(report, max_rows, time.monotonic())

    return observe


def _load_tokenizers(registry: Registry) -> None:
    for embedder in registry:
        tokenizer = embedder.model.tokenizer
        if isinstance(tokenizer, DeferredTokenizer):
            tokenizer.load()


def _open(config: ServerConfig, registry: Registry, shared: SharedParts) -> None:
    """Let calls reach the models."""
    service = EmbedService(registry, config.stream_stall_s)
    embed_pb2_grpc.add_EmbedServiceServicer_to_server(service, cast("grpc.aio.Server", shared.service))
    if shared.kserve is not None:
        handler = handler_of(InferenceService(registry), MODEL_METHODS)
        shared.kserve.add_generic_rpc_handlers((handler,))
    if shared.http is not None:
        from bilm_server.protocols.http.endpoints import endpoints_of  # noqa: PLC0415 - only where HTTP is on

        shared.http.open(endpoints_of(registry))


def engine_views(models: Sequence[ServingModel], stalled_s: Callable[[], float]) -> Sequence[EngineView]:
    """Return what the metrics read of each model's engine."""
    return [_engine_view(each, stalled_s) for each in models]


def _engine_view(embedding: ServingModel, stalled_s: Callable[[], float]) -> EngineView:
    model, worker = embedding.loaded.model, embedding.worker
    engine = model.engine
    return EngineView(
        model=_labels(model),
        kernel_paths=lambda: engine.description.paths,
        fallbacks=fallback_counts,  # kernels are the process's, and so every model's
        max_rows=engine.capacity.rows,
        stalled_s=stalled_s,
        rows=lambda: worker.rows,
        waiting_sentences=lambda: worker.waiting,
        waiting_by_priority=lambda: {priority.value: worker.waiting_of(priority) for priority in Priority},
        rows_by_priority=lambda: {priority.value: worker.rows_of(priority) for priority in Priority},
        cache=lambda: (engine.stats.cache.hits, engine.stats.cache.misses),
        ticks=lambda: engine.stats.ticks,
    )


def gpu_of(config: ServerConfig) -> Gpu | None:
    """Return the GPU that models compute on; None: a CPU does."""
    device = resolve_device(config.device)
    return find_gpu(str(torch.cuda.get_device_properties(device).uuid)) if device.type == "cuda" else None


def _labels(model: ServedModel) -> dict[str, str]:
    return {
        "name": model.name,
        "version": model.version,
        "precision": model.precision,
        "backend": model.engine.description.backend,
        "tokenizer": model.tokenizer.name,
    }
