"""Several real models in one process: found by name, reloaded beside calls, each as in a server of its own."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_client import AsyncClient, Chosen, ScalarMix, SentenceError, ServiceError
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.sentences import PlainSentence
from bilm_model.weights import single_file
from bilm_server.app import build_server
from bilm_server.config import ServerConfig
from bilm_server.config_sources import load_config
from bilm_server.embedding.model_set import check_memory
from bilm_server.errors import ConfigurationError
from bilm_server.lifecycle import Server
from bilm_server.preflight import plan_serving
from bilm_server.served_model import host_bytes, load_served_model

from tests.support.embedders import until

SENTENCES = [["a", "bank", "of", "the", "river"], ["play", "it"], ["x"] * 70]
TOKEN = "a" * 32
TINY = SIZES["tiny"]


def write(path: Path, seed: int) -> str:
    """Write a model in the place of another one, as somebody careful does; return its version."""
    new = path.with_suffix(".new")
    version = single_file.write(new, TINY, random_bilm(TINY, seed=seed).state_dict())
    new.rename(path)
    return version


class Running:
    """A server on models a and b, whose configuration is a file.

    Attributes:
        folder: of the file and the models.
        versions: of the models.
        server: itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions = {name: write(folder / f"{name}.safetensors", seed) for seed, name in enumerate("ab")}
        (folder / "tokens").write_text(f"operator {TOKEN}\nanybody {'b' * 32}\n", encoding="utf-8")
        (folder / "tokens").chmod(0o600)
        self.configure("a", "b")
        self.flags = ["--config", str(folder / "bilm.toml"), "--listen", "127.0.0.1:0", "--drain-delay-s", "0"]
        self.flags += ["--token-file", str(folder / "tokens")]
        config = self.read()
        self.server: Server = build_server(config, plan_serving(config), load_served_model, read_config=self.read)

    def configure(self, *names: str, also: str = "") -> None:
        """Write the configuration: these models, and what else stands in it."""
        models = [f'[[models]]\nname = "{name}"\npath = "{self.folder / name}.safetensors"\n' for name in names]
        callers = '[[callers]]\nname = "operator"\nrights = ["reload"]\n'
        (self.folder / "bilm.toml").write_text("\n".join([*models, also, callers]), encoding="utf-8")

    def read(self) -> ServerConfig:
        return load_config(self.flags)

    def client(self, **options: Any) -> AsyncClient:
        return AsyncClient(self.server.target, token=TOKEN, **options)

    async def embed(self, name: str) -> list[np.ndarray[Any, Any]]:
        """Return what a model makes of the sentences."""
        async with self.client(model=name) as client:
            return [found.vectors for found in await client.embed(SENTENCES)]

    async def ask(self, name: str, sentences: Any, **options: Any) -> Any:
        """Return embeddings by a model."""
        async with self.client(model=name) as client:
            return await client.embed(sentences, **options)

    async def reload(self, token: str = TOKEN) -> Any:
        """Call the RPC."""
        async with grpc.aio.insecure_channel(self.server.target) as channel:
            stub: Any = embed_pb2_grpc.AdminServiceStub(channel)
            return await stub.Reload(embed_pb2.ReloadRequest(), metadata=(("authorization", f"Bearer {token}"),))


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Running]:
    it = Running(folder)
    await it.server.start()
    await it.server.load()
    try:
        yield it
        await until(lambda: all(embedder.idle for embedder in it.server.models.registry))
    finally:
        await it.server.stop()


def alone(path: Path) -> list[np.ndarray[Any, Any]]:
    """Return what the model makes of the sentences where it is the only one, by the engine itself."""
    config, tensors, _ = single_file.read(path)
    bilm = random_bilm(config)
    bilm.load_state_dict(tensors)
    found = CellularBatch(bilm, bilm.zero_state(0).h.device).run([PlainSentence(tuple(each)) for each in SENTENCES])
    return [each.layers[:, 1:-1].numpy() for each in found]


def equal(found: list[np.ndarray[Any, Any]], expected: list[np.ndarray[Any, Any]]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


async def test_each_model_answers_as_it_does_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        expected = {name: await asyncio.to_thread(alone, tmp_path / f"{name}.safetensors") for name in "ab"}
        found = await asyncio.gather(*(it.embed(name) for name in ("a", "b", "", "b", "a")))
        for name, vectors in zip("abaab"[:2] + "a" + "ba", found, strict=True):
            assert equal(vectors, expected[name])
        async with it.client() as client:
            models = await client.list_models()
            assert [(model.name, model.version) for model in models] == [*it.versions.items()]
            for name in ("", "model:a", "model:b"):
                assert (await client.health(name)).value == "SERVING"
        with pytest.raises(ServiceError) as error:
            await it.embed("other")
        assert error.value.reason == "MODEL_NOT_FOUND"
        assert "a, b" in str(error.value)


async def test_reload_replaces_adds_and_removes_without_a_failed_call(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        stop, answers = asyncio.Event(), {"a": set[str](), "b": set[str]()}

        async def call(name: str) -> None:
            async with it.client(model=name) as client:
                while not stop.is_set():
                    (found,) = await client.embed([["a", "word"]])
                    answers[name].add(found.model_version)

        calling = [asyncio.create_task(call(name)) for name in "ab" for _ in range(2)]
        new = await asyncio.to_thread(write, tmp_path / "a.safetensors", 7)
        await asyncio.to_thread(write, tmp_path / "c.safetensors", 8)
        it.configure("a", "b", "c")
        done = await it.reload()
        assert (done.added, done.replaced, done.removed, done.kept) == (["c"], ["a"], [], ["b"])
        await until(lambda: new in answers["a"])
        stop.set()
        await asyncio.gather(*calling)
        assert answers == {"a": {it.versions["a"], new}, "b": {it.versions["b"]}}
        assert equal(await it.embed("a"), await asyncio.to_thread(alone, tmp_path / "a.safetensors"))
        it.configure("c")
        done = await it.reload()
        assert (done.added, done.replaced, done.removed, done.kept) == ([], [], ["a", "b"], ["c"])
        assert equal(await it.embed(""), await asyncio.to_thread(alone, tmp_path / "c.safetensors"))
        async with it.client() as client:
            assert [model.name for model in await client.list_models()] == ["c"]


async def test_a_stream_ends_on_the_version_that_it_began_with(tmp_path: Path) -> None:
    async with running(tmp_path) as it, grpc.aio.insecure_channel(it.server.target) as channel:
        stub: Any = embed_pb2_grpc.EmbedServiceStub(channel)
        stream = stub.EmbedStream(metadata=(("authorization", f"Bearer {TOKEN}"),))

        async def ask(number: int) -> str:
            sentence = embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=["a"]))
            item = embed_pb2.StreamItem(id=number, sentence=sentence)
            await stream.write(embed_pb2.EmbedStreamRequest(item=item))
            return str((await stream.read()).usage.model_version)

        await stream.write(embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(model="a")))
        old = it.versions["a"]
        assert await ask(1) == old
        await asyncio.to_thread(write, tmp_path / "a.safetensors", 7)
        assert (await it.reload()).replaced == ["a"]
        assert await ask(2) == old
        with pytest.raises(ServiceError) as error:
            async with it.client(model="a", expected_model_version=old) as client:
                await client.embed([["a"]])
        assert error.value.reason == "MODEL_VERSION_MISMATCH"
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF


def _cut(folder: Path) -> None:
    path = folder / "a.safetensors"
    path.with_suffix(".new").write_bytes(path.read_bytes()[:-100])
    path.with_suffix(".new").rename(path)


def _remove(folder: Path) -> None:
    (folder / "a.safetensors").unlink()


def _empty(folder: Path) -> None:
    (folder / "bilm.toml").write_text("", encoding="utf-8")


def _misspell(folder: Path) -> None:
    path = folder / "bilm.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("path =", "paths ="), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "says"),
    [(_cut, "a.safetensors"), (_remove, "no such file"), (_misspell, "paths"), (_empty, "names none")],
)
async def test_a_reload_that_fails_changes_nothing_and_says_why(
    tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    async with running(tmp_path) as it:
        expected = await it.embed("a")
        damage(tmp_path)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await it.reload()
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert says in str(error.value.details())
        assert equal(await it.embed("a"), expected)


async def test_a_file_that_was_only_touched_is_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        os.utime(tmp_path / "a.safetensors")
        assert (await it.reload()).kept == ["a", "b"]


async def test_only_callers_with_the_right_reload(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await it.reload("b" * 32)
        assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
        it.configure("a", "b", also='[[callers]]\nname = "anybody"\nrights = ["reload"]\n')
        await it.reload()
        assert (await it.reload("b" * 32)).kept == ["a", "b"]


async def test_a_signal_reloads_and_the_log_says_what_came_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bilm_server.app")
    async with running(tmp_path) as it:
        it.configure("b", "a")
        it.server.ask_to_reload()
        await until(lambda: any("reloaded: added none" in each.getMessage() for each in caplog.records))
        assert it.server.embedder.model.name == "b"
        (tmp_path / "bilm.toml").unlink()
        it.server.ask_to_reload()
        await until(lambda: any("nothing has changed" in each.getMessage() for each in caplog.records))
        assert it.server.embedder.model.name == "b"


def test_models_that_do_not_fit_the_memory_are_refused(tmp_path: Path) -> None:
    plans = [*plan_serving(Running(tmp_path).read()).models.values()]
    device = torch.device("cpu")
    each = host_bytes(plans[0].config, plans[0].header, device)
    loading, process = 4 * plans[0].header.parameter_count, 400 * 2**20
    check_memory(plans, (), process + loading + 2 * each)
    check_memory((), plans, 0)
    with pytest.raises(ConfigurationError, match="models: a, b: "):
        check_memory(plans, (), process + loading + 2 * each - 1)
    with pytest.raises(ConfigurationError, match="models: a: "):
        check_memory(plans[:1], plans, process + loading + 3 * each - 1)


# ---- ensembles ----

_ENSEMBLE = '[[models]]\nname = "{name}"\nmembers = ["a", "b"]\n{more}\n'


def write_deep(path: Path) -> None:
    """Write a model with a layer more than the others have."""
    config = replace(TINY, n_layers=TINY.n_layers + 1)
    single_file.write(path, config, random_bilm(config, seed=5).state_dict())


@asynccontextmanager
async def with_ensemble(folder: Path, more: str = "", *, deep: bool = False) -> AsyncIterator[Running]:
    """Yield a server with an ensemble "both" of a and b, of which b may be deeper."""
    it = Running(folder)
    if deep:
        write_deep(folder / "b.safetensors")
    it.configure("a", "b", also=_ENSEMBLE.format(name="both", more=more))
    config = it.read()
    it.server = build_server(config, plan_serving(config), load_served_model, read_config=it.read)
    await it.server.start()
    await it.server.load()
    try:
        yield it
        await until(lambda: all(embedder.idle for embedder in it.server.models.registry))
    finally:
        await it.server.stop()


Options = dict[str, Any]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": "top"},
        {"layers": "average", "pool": "mean"},
        {"layers": "mix", "mix": ScalarMix((0.5, -1.0, 2.0), 0.7, layer_norm=True)},
        {"layers": "top", "pool": "max", "dtype": "float16"},
    ],
)
async def test_an_ensembles_vectors_are_those_of_its_members(tmp_path: Path, options: Options) -> None:
    async with with_ensemble(tmp_path) as it:
        found, a, b = [await it.ask(name, SENTENCES, **options) for name in ("both", "a", "b")]
        for each, *parts in zip(found, a, b, strict=True):
            assert np.array_equal(each.vectors, np.concatenate([part.vectors for part in parts], axis=-1))


async def test_an_ensemble_chooses_as_its_members_do(tmp_path: Path) -> None:
    async with with_ensemble(tmp_path) as it:
        for chosen, options in (({"rows": [4, 1]}, {}), ({"spans": [(1, 2), (3, 5)]}, {"pool": "mean"})):
            asked = [Chosen(SENTENCES[0], **chosen)]
            (found,), *parts = [await it.ask(name, asked, **options) for name in ("both", "a", "b")]
            assert np.array_equal(found.vectors, np.concatenate([part.vectors for (part,) in parts], axis=-1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
async def test_an_ensembles_vectors_are_scaled_as_one(tmp_path: Path, dtype: str) -> None:
    async with with_ensemble(tmp_path) as it:
        (found,) = await it.ask("both", SENTENCES[:1], layers="top", l2_normalize=True, dtype=dtype)
        (plain,) = await it.ask("both", SENTENCES[:1], layers="top")
        expected = plain.vectors / np.linalg.norm(plain.vectors, axis=-1, keepdims=True)
        assert np.allclose(found.vectors, expected, atol=1e-6 if dtype == "float32" else 1e-3)


@pytest.mark.parametrize(
    ("more", "layers"),
    [("", (1, 2, 3)), ("layers = [[0, 1, 2], [0, 1, 3]]", (0, 1, 3)), ("layers = [[1, 2], [0, 2]]", (0, 2))],
)
async def test_layers_of_members_that_differ_are_paired(tmp_path: Path, more: str, layers: tuple[int, ...]) -> None:
    async with with_ensemble(tmp_path, more, deep=True) as it:
        whole = {name: (await it.ask(name, SENTENCES[:1]))[0].vectors for name in "ab"}
        own = {"a": (1, 2) if len(layers) == 2 else (0, 1, 2), "b": layers}
        expected = np.concatenate([whole[name][list(own[name])] for name in "ab"], axis=-1)

        async def ask(**options: Any) -> Any:
            (found,) = await it.ask("both", SENTENCES[:1], **options)
            return found.vectors

        assert np.array_equal(await ask(), expected)
        assert np.array_equal(await ask(layers="top"), expected[-1])
        assert np.allclose(await ask(layers="average"), expected.mean(axis=0), atol=1e-6)
        shares = np.exp(weights := np.linspace(-1, 1, len(layers))) / np.exp(weights).sum()
        mixed = await ask(layers="mix", mix=ScalarMix(tuple(weights), 2.0))
        assert np.allclose(mixed, 2 * np.tensordot(shares, expected, axes=1), atol=1e-5)
        async with it.client(model="both") as client:
            info = await client.model_info()
        assert (info.members, info.layer_count, info.width) == (("a", "b"), len(layers), 4 * TINY.projection_dim)


async def test_an_ensembles_state_is_carried(tmp_path: Path) -> None:
    async with with_ensemble(tmp_path) as it:

        async def carried(name: str) -> Any:
            (first,) = await it.ask(name, SENTENCES[:1], return_states=True)
            (second,) = await it.ask(name, SENTENCES[1:2], states=[first.state])
            return second.vectors

        found = await carried("both")
        (fresh,) = await it.ask("both", SENTENCES[1:2])
        assert not np.array_equal(found, fresh.vectors)
        assert np.array_equal(found, np.concatenate([await carried("a"), await carried("b")], axis=-1))
        with pytest.raises(SentenceError) as error:
            await it.ask("both", SENTENCES[:1], states=[b"damaged"])
        assert error.value.reason == "STATE_INVALID"


async def test_a_reload_of_a_member_is_one_of_its_ensembles(tmp_path: Path) -> None:
    async with with_ensemble(tmp_path) as it:
        await asyncio.to_thread(write, tmp_path / "b.safetensors", 9)
        done = await it.reload()
        assert (done.kept, done.replaced) == (["a"], ["b", "both"])
        assert (await it.reload()).kept == ["a", "b", "both"]
        it.configure("a", "b")
        assert (await it.reload()).removed == ["both"]


async def test_members_outlive_ensembles_that_still_drain(tmp_path: Path) -> None:
    """An ensemble that one reload has retired is used by a stream while later ones retire its members."""
    async with with_ensemble(tmp_path) as it, grpc.aio.insecure_channel(it.server.target) as channel:
        stub: Any = embed_pb2_grpc.EmbedServiceStub(channel)
        stream = stub.EmbedStream(metadata=(("authorization", f"Bearer {TOKEN}"),))
        await stream.write(embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(model="both")))
        sentence = embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=["a"]))
        for number, changed in enumerate(["", "b", "a"]):
            if changed:
                await asyncio.to_thread(write, tmp_path / f"{changed}.safetensors", 20 + number)
                assert (await it.reload()).replaced == [changed, "both"]
            item = embed_pb2.StreamItem(id=number, sentence=sentence)
            await stream.write(embed_pb2.EmbedStreamRequest(item=item))
            assert (await stream.read()).HasField("rows")
        it.configure("a")
        await it.reload()
        await stream.write(embed_pb2.EmbedStreamRequest(item=embed_pb2.StreamItem(id=9, sentence=sentence)))
        assert (await stream.read()).HasField("rows")
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF


@pytest.mark.parametrize(
    ("also", "says"),
    [
        (_ENSEMBLE.format(name="both", more="layers = [[0, 1], [0, 9]]"), "both: layers: b has no layer 9"),
        ('[[models]]\nname = "c"\npath = "random:tiny"\ntokenizer = "whitespace"\n'
         '[[models]]\nname = "both"\nmembers = ["a", "c"]\n', "both: its members have different tokenizers"),
    ],
)  # fmt: skip
def test_ensembles_that_do_not_fit_together_are_refused(tmp_path: Path, also: str, says: str) -> None:
    it = Running(tmp_path)
    it.configure("a", "b", also=also)
    with pytest.raises(ConfigurationError, match=says):
        plan_serving(it.read())
