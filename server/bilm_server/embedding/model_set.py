"""The models of a running server: loaded one after the other, started, replaced by others, and drained."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bilm_model.device import resolve_device
from bilm_model.weights.finding import RANDOM, find
from bilm_system.control_groups import memory_limit_bytes

from bilm_server.config import ServerConfig
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.ensemble import Ensemble, Member
from bilm_server.embedding.registry import Registry
from bilm_server.errors import ConfigurationError
from bilm_server.inference.engine_thread import EngineThread
from bilm_server.inference.worker import InferenceWorker
from bilm_server.own_thread import in_own_thread
from bilm_server.preflight import EnsemblePlan, ModelPlan, ServingPlan
from bilm_server.security.reloading import Stamp, stamp_of
from bilm_server.served_model import MODEL_SETTINGS, ServedModel, host_bytes

_FLOAT_BYTES = 4
_PROCESS_BYTES = 400 * 2**20
"""Python, torch and kernels: what is there beside the models."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changes:
    """What a reload did, by names of models and ensembles.

    Attributes:
        added: that were not served before.
        replaced: whose files or settings are others now.
        removed: that are not served any more.
        kept: that were left as they are.
    """

    added: Sequence[str]
    replaced: Sequence[str]
    removed: Sequence[str]
    kept: Sequence[str]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that is in memory.

    Attributes:
        plan: that it follows.
        stamps: of its files, from before they were read.
        model: itself.
    """

    plan: ModelPlan
    stamps: Sequence[Stamp]
    model: ServedModel

    def follows(self, plan: ModelPlan) -> bool:
        """Return whether it is what a plan asks for, as far as its files' stamps tell."""
        return (
            self.plan.weight == plan.weight
            and _settings(self.plan) == _settings(plan)
            and (self.stamps == _stamps(plan.config))
        )


@dataclass(frozen=True, eq=False)
class ServingModel:
    """A model that serves.

    Attributes:
        loaded: the model.
        embedder: what embeds by it.
        worker: what drives its engine.
    """

    loaded: Loaded
    embedder: Embedder
    worker: InferenceWorker


@dataclass(frozen=True, eq=False)
class ServingEnsemble:
    """An ensemble that serves.

    Attributes:
        plan: that it follows.
        members: what embeds by its models.
        embedder: what embeds by it.
        releases: give its members back, which it keeps as long as a call uses it.
    """

    plan: EnsemblePlan
    members: Sequence[Embedder]
    embedder: Embedder
    releases: Sequence[Callable[[], None]]


class ModelSet:
    """Used from the event loop only, save `load`.

    Attributes:
        registry: where calls find them.
    """

    def __init__(
        self,
        registry: Registry,
        load: Callable[[ServerConfig], ServedModel],
        serve: Callable[[ServedModel, float], tuple[Embedder, InferenceWorker]],
        serve_ensemble: Callable[[Ensemble, Sequence[Member]], Embedder],
        on_names: Callable[[Sequence[str]], None],
        *,
        thread: EngineThread,
    ) -> None:
        """Keep the parts; call `load` and `start` for the first models.

        Args:
            registry: has none yet.
            load: loads a model.
            serve: makes what serves it, with its weight; nothing of that has started.
            serve_ensemble: makes what serves an ensemble.
            on_names: takes the names of all that will be served, before calls find them.
            thread: in which their engines compute.
        """
        self.registry, self._thread = registry, thread
        self._load_model, self._serve, self._serve_ensemble, self._on_names = load, serve, serve_ensemble, on_names
        self._running: dict[str, ServingModel] = {}
        self._ensembles: dict[str, ServingEnsemble] = {}
        self._left: list[ServingModel] = []
        self._draining: set[asyncio.Task[None]] = set()
        self._loading: threading.Thread | None = None

    @property
    def models(self) -> Sequence[ServingModel]:
        """Those that serve."""
        return tuple(self._running.values())

    @property
    def loading(self) -> bool:
        """Whether a thread loads or computes; after `stop`: one that couldn't be waited for."""
        return self._thread.alive or (self._loading is not None and self._loading.is_alive())

    def health(self) -> Mapping[str, bool]:
        """Return by name, the default one first, whether the last thing that each computed succeeded."""
        return {embedder.model.name: embedder.healthy for embedder in self.registry}

    # ---- in a thread that loads ----

    def load(self, plans: Sequence[ModelPlan], beside: Sequence[ModelPlan] = ()) -> list[Loaded]:
        """Load models.

        Args:
            plans: of them.
            beside: of those that are in memory already, and stay there meanwhile.

        Raises:
            ConfigurationError: if they don't fit the memory that the process may have.
            ModelError: if one can't be served.
        """
        check_memory(plans, beside, memory_limit_bytes())
        return [Loaded(plan, _stamps(plan.config), self._load_model(plan.config)) for plan in plans]

    # ---- on the event loop ----

    async def start(self, plan: ServingPlan, loaded: Sequence[Loaded]) -> None:
        """Warm models up, and let calls find them.

        Raises:
            Exception: what an engine raised, if it failed.
        """
        self._switch(plan, await self._started(loaded))

    async def reload(self, plan: ServingPlan) -> Changes:
        """Serve what a plan says from now on; calls under way end on what they began with. One reload at a time.

        Raises:
            ConfigurationError: if the new models don't fit the memory beside the others.
            ModelError: if one can't be served.
            Exception: what an engine raised. Whatever it is, nothing has changed.
        """
        running = {name: self._running[name] for name, each in plan.models.items() if self._follows(name, each)}
        fresh = await self._loaded([each for name, each in plan.models.items() if name not in running])
        for each in fresh:
            if self._computes_the_same(each):  # its file was touched, or written again
                present = self._running[each.plan.name]
                running[each.plan.name] = replace(present, loaded=replace(present.loaded, stamps=each.stamps))
        started = await self._started([each for each in fresh if each.plan.name not in running])
        before = {embedder.model.name: embedder for embedder in self.registry}
        models, ensembles = self._running, self._ensembles
        self._switch(plan, running | started)
        after = {embedder.model.name: embedder for embedder in self.registry}
        workers = [each for name, each in models.items() if after.get(name) is not each.embedder]
        retired = [each for name, each in ensembles.items() if after.get(name) is not each.embedder]
        self._begin_to_drain(retired, workers)
        return Changes(
            added=[name for name in after if name not in before],
            replaced=[name for name in after if name in before and after[name] is not before[name]],
            removed=[name for name in before if name not in after],
            kept=[name for name in after if after[name] is before.get(name)],
        )

    async def stop(self) -> None:
        """Stop what serves, and what drains."""
        for task in self._draining:
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)
        for each in self.models:
            await each.worker.stop()

    def _switch(self, plan: ServingPlan, running: Mapping[str, ServingModel]) -> None:
        """Let calls find these models, and the ensembles of them."""
        ensembles = {name: self._ensemble(each, running) for name, each in plan.ensembles.items()}
        embedders = {name: each.embedder for name, each in running.items()}
        embedders |= {name: each.embedder for name, each in ensembles.items()}
        self._running = {name: running[name] for name in plan.models}
        self._ensembles = ensembles
        self._on_names(plan.names)
        self.registry.replace([embedders[name] for name in plan.names])

    def _ensemble(self, plan: EnsemblePlan, running: Mapping[str, ServingModel]) -> ServingEnsemble:
        """Return an ensemble: the present one, unless it or one of its members is another one now."""
        embedders = [running[name].embedder for name in plan.members]
        present = self._ensembles.get(plan.name)
        if present is not None and present.plan == plan and present.members == embedders:
            return present
        members = [
            Member(embedder.model, embedder.worker, layers)
            for embedder, layers in zip(embedders, plan.layers, strict=True)
        ]
        embedder = self._serve_ensemble(Ensemble(plan.name, members), members)
        return ServingEnsemble(plan, embedders, embedder, [each.take() for each in embedders])

    def _begin_to_drain(self, ensembles: Sequence[ServingEnsemble], models: Sequence[ServingModel]) -> None:
        """Stop models when no call uses them any more, or an ensemble of them, since whichever reload that drains."""
        self._left += models

        async def drain() -> None:
            try:
                for ensemble in ensembles:
                    await ensemble.embedder.given_back()
                    for release in ensemble.releases:
                        release()
                for each in models:
                    await each.embedder.given_back()
            finally:
                for each in models:
                    await each.worker.stop()
                    self._left.remove(each)
                    _log.info("model %s, version %s: drained", each.loaded.model.name, each.loaded.model.version)

        task = asyncio.create_task(drain())
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    def _follows(self, name: str, plan: ModelPlan) -> bool:
        return name in self._running and self._running[name].loaded.follows(plan)

    def _computes_the_same(self, fresh: Loaded) -> bool:
        running = self._running.get(fresh.plan.name)
        if running is None or _settings(running.loaded.plan) != _settings(fresh.plan):
            return False
        return running.loaded.model.version == fresh.model.version and running.loaded.plan.weight == fresh.plan.weight

    async def _loaded(self, plans: Sequence[ModelPlan]) -> list[Loaded]:
        """Load models beside those that serve, and warm them up, so that the thread that all share needn't."""
        beside = [each.loaded.plan for each in (*self.models, *self._left)]

        def load() -> list[Loaded]:
            found = self.load(plans, beside)
            for each in found:
                each.model.engine.warm_up()
            return found

        if not plans:
            return []
        future, self._loading = in_own_thread(load, "loading")
        return await future

    async def _started(self, loaded: Sequence[Loaded]) -> dict[str, ServingModel]:
        started: dict[str, ServingModel] = {}
        try:
            for each in loaded:
                embedder, worker = self._serve(each.model, each.plan.weight)
                started[each.plan.name] = ServingModel(each, embedder, worker)
                await worker.start()
        except BaseException:
            for embedding in started.values():
                await embedding.worker.stop()
            raise
        return started


def _settings(plan: ModelPlan) -> tuple[object, ...]:
    return tuple(getattr(plan.config, name) for name in MODEL_SETTINGS)


def _stamps(config: ServerConfig) -> Sequence[Stamp]:
    return tuple(map(stamp_of, _files(config)))


def _files(config: ServerConfig) -> Iterator[Path]:
    if not config.model.startswith(RANDOM):
        found = find(config.model, config.options)
        yield found.weights
        if found.options is not None:
            yield found.options


def check_memory(plans: Sequence[ModelPlan], beside: Sequence[ModelPlan], limit: int) -> None:
    """Refuse models that the kernel would end the process for while they load, or later.

    Args:
        plans: of the models that are to be loaded, one after the other.
        beside: of those that are in memory meanwhile.
        limit: bytes that the process may have.

    Raises:
        ConfigurationError: naming what they take and what there is.
    """
    if not plans:
        return
    device = resolve_device(plans[0].config.device)
    loading = max(_FLOAT_BYTES * plan.header.parameter_count for plan in plans)
    needed = _PROCESS_BYTES + loading + sum(host_bytes(plan.config, plan.header, device) for plan in (*plans, *beside))
    if needed > limit:
        names = ", ".join(plan.name for plan in plans)
        raise ConfigurationError(
            f"models: {names}: with what is loaded they take {needed >> 20:,} MiB while they load, more than the "
            f"{limit >> 20:,} MiB that the process may have (bilm-serve --check-config shows the parts)"
        )
