"""A run of `bilm-embed` against a scripted server: when its output appears, and from what it is made."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client.batch.outputs.base import OpenOutput, new_output, read_run
from bilm_client.batch.pipeline import Summary, embed_file
from bilm_client.batch.reader import open_input
from bilm_client.batch.settings import load_settings
from bilm_client.cli.settings_sources import UsageError
from bilm_client.testing import FakeModel

from tests.support.scripted import Scripted

LINES = ("one sentence", "another one", "and a third")
Run = Callable[..., Summary | None]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.npz"


@pytest.fixture
def run(answering: Scripted, tmp_path: Path, output: Path) -> Run:
    (text := tmp_path / "text").write_text("\n".join(LINES) + "\n", encoding="utf-8")

    def embed(open_output: OpenOutput, *flags: str) -> Summary | None:
        settings = load_settings([str(text), str(output), "--target", answering.target, *flags])
        with open_input(settings) as lines:
            return asyncio.run(embed_file(settings, lines, open_output))

    return embed


def others(output: Path) -> set[str]:
    return {path.name for path in output.parent.iterdir()} - {"text"}


def test_a_run_embeds_each_line_under_its_number(run: Run, output: Path) -> None:
    summary = run(new_output)
    assert summary is not None
    assert (summary.n_embedded, summary.n_failed, summary.n_tokens) == (3, 0, 7)
    with np.load(output) as found:
        assert [found[str(index)].shape for index in range(3)] == [(3, 2, 16), (3, 2, 16), (3, 3, 16)]
    assert others(output) == {"out.npz"}


@pytest.mark.parametrize("flags", [(), ("--carry-state",)])
@pytest.mark.parametrize(("priority", "expected"), [((), pb.PRIORITY_BATCH), (("--priority", "interactive"), 0)])
def test_a_run_is_batch_unless_it_is_told_otherwise(
    run: Run, answering: Scripted, flags: tuple[str, ...], priority: tuple[str, ...], expected: int
) -> None:
    service = answering.service
    n_requests, n_streams = len(service.embed_requests), len(service.streams)  # of other tests
    assert run(new_output, *flags, *priority)
    stated = {request.priority for request in service.embed_requests[n_requests:]}
    stated |= {stream[0].start.priority for stream in service.streams[n_streams:]}
    assert stated == {expected}


@pytest.fixture
def several(answering: Scripted) -> Iterator[Scripted]:
    answering.service.serve(FakeModel("en"), FakeModel("de", width=8))
    yield answering
    answering.service.serve(FakeModel())


@pytest.mark.parametrize("flags", [(), ("--carry-state",)])
def test_a_run_stays_with_the_model_that_it_began_with(
    run: Run, several: Scripted, output: Path, flags: tuple[str, ...]
) -> None:
    """Also where it names none, and another one becomes the default."""

    def breaking(_path: Path, _made_by: dict[str, Any]) -> AbstractContextManager[Any]:
        raise OSError("no output this time")

    service = several.service
    service.embed_requests.clear()
    service.streams.clear()
    with pytest.raises(OSError, match="no output"):
        run(breaking, *flags)
    named = {request.model for request in service.embed_requests} | {each[0].start.model for each in service.streams}
    assert named == {"en"}
    several.service.serve(FakeModel("de", width=8), FakeModel("en"))
    with pytest.raises(UsageError, match=r"model: then en, now de.*model_version: then en-1, now de-1"):
        run(new_output, "--resume", *flags)
    summary = run(new_output, "--resume", "--model", "en", *flags)
    assert summary is not None
    assert summary.n_embedded == 3
    with np.load(output) as found:
        assert found["0"].shape == (3, 2, 16)


def test_an_unknown_model_ends_a_run_before_it_begins(run: Run, several: Scripted, output: Path) -> None:
    with pytest.raises(UsageError, match="model: .*expected one of de, en"):
        run(new_output, "--model", "fr")
    assert others(output) == set()


def test_no_partial_file_has_the_final_name(run: Run, output: Path) -> None:
    seen: list[set[str]] = []

    @contextmanager
    def watched(path: Path, made_by: dict[str, Any]) -> Iterator[Any]:
        with new_output(path, made_by) as (write, write_sentences):

            def look(key: str, vectors: Any) -> None:
                write(key, vectors)
                seen.append(others(output))

            yield look, write_sentences
        seen.append(others(output))

    run(watched)
    assert seen == [{"out.npz.part", "out.npz.journal"}] * len(LINES) + [{"out.npz", "out.npz.journal"}]
    assert read_run(output) is not None


def test_a_journal_that_lacks_lines_makes_no_output(run: Run, output: Path) -> None:
    @contextmanager
    def losing(path: Path, made_by: dict[str, Any]) -> Iterator[Any]:
        journal = output.with_name("out.npz.journal")
        with journal.open("r+b") as file:
            file.truncate(journal.stat().st_size - 1)  # the last record isn't whole any more
        with new_output(path, made_by) as writers:
            yield writers

    with pytest.raises(UsageError, match="not what the input has"):
        run(losing)
    assert others(output) == {"out.npz.journal"}
