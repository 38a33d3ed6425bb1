"""A run: remaining lines go to the server, results to the journal, at the end all of it to the output."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from bilm_system.files import naming
from tqdm import tqdm

from bilm_client.aio import AsyncClient, AsyncTransportClient
from bilm_client.batch.backoff import PASSING, Backoff, print_line
from bilm_client.batch.identity import check_same_run, run_identity
from bilm_client.batch.journal import Journal, JournalRecord
from bilm_client.batch.outputs.base import OpenOutput, new_output, read_run
from bilm_client.batch.reader import InputText, Line
from bilm_client.batch.settings import RunSettings
from bilm_client.cli.settings_sources import UsageError
from bilm_client.errors import BilmError, ModelNotFoundError, SentenceError
from bilm_client.results import Embedding, ModelInfo

_STATE_EVERY = 16
_BAD_LINE = "LINE_INVALID"


class BadLineError(BilmError):
    """A line that can't be embedded, in a run that stops at the first."""


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        n_embedded: lines in the output.
        n_failed: lines in the list of errors.
        n_resumed: of both, those that an earlier run had done.
        n_tokens: embedded by this run.
        seconds: that this run took.
    """

    n_embedded: int
    n_failed: int
    n_resumed: int
    n_tokens: int
    seconds: float


NewClient = Callable[[str, str], AsyncTransportClient]
"""Makes a client of a model's name and expected version."""
OpenClients = Callable[[RunSettings], contextlib.AbstractContextManager[NewClient]]


@contextlib.contextmanager
def remote_clients(settings: RunSettings) -> Iterator[NewClient]:
    """Return what makes clients of the server that the settings name.

    Raises:
        UsageError: A file of credentials can't be used.
    """
    credentials, token = settings.credentials()

    def new(model: str, model_version: str) -> AsyncClient:
        return AsyncClient(
            settings.target,
            balance=settings.balance,
            model=model,
            expected_model_version=model_version,
            timeout_s=settings.timeout_s,
            credentials=credentials,
            token=token,
            proxy=settings.proxy,
        )

    yield new


async def embed_file(
    settings: RunSettings,
    text: InputText,
    open_output: OpenOutput = new_output,
    open_clients: OpenClients = remote_clients,
) -> Summary | None:
    """Embed a file; return None if the output was there already, made by the same run.

    Raises:
        UsageError: What is there doesn't go together with the settings.
        BadLineError: The first bad line, where no list of errors was asked for.
        BilmError: The server refuses, or can't be reached for longer than `patience_s`.
    """
    _check_not_there(settings)
    with open_clients(settings) as new_client:
        async with new_client(settings.model, "") as client:
            info = await _model_info(client, settings.patience_s)
            identity = run_identity(settings, text, info)
            if settings.resume and settings.output.exists() and not _journal_path(settings).exists():
                check_same_run(settings.output, read_run(settings.output), identity)
                return None
        # From here on, a server with another model must refuse rather than mix its vectors in; by its name, since which
        # one is the default may change
        async with new_client(info.name, info.version) as client:
            with _BatchRun(settings, text, identity, open_output) as run:
                await (run.embed_in_order(client) if settings.carry_state else run.embed_in_batches(client))
                return run.finish()


async def _model_info(client: AsyncTransportClient, patience_s: float) -> ModelInfo:
    backoff = Backoff(patience_s)
    while True:
        try:
            return await client.model_info()
        except PASSING as error:
            await backoff.wait(error)
        except ModelNotFoundError as error:
            raise UsageError(f"model: {error.message}") from error


def _journal_path(settings: RunSettings) -> Path:
    return settings.output.with_name(settings.output.name + ".journal")


def _check_not_there(settings: RunSettings) -> None:
    if settings.resume or settings.overwrite:
        return
    if settings.output.exists():
        raise UsageError(f"output: {settings.output} is there already (--overwrite replaces it)")
    if (journal := _journal_path(settings)).exists():
        raise UsageError(f"{journal}: an interrupted run is there (--resume goes on, --overwrite starts anew)")


class _BatchRun:
    """The journal and the list of errors of a run under way."""

    def __init__(
        self, settings: RunSettings, text: InputText, identity: dict[str, Any], open_output: OpenOutput
    ) -> None:
        self._settings, self._text, self._identity = settings, text, identity
        self._open_output = open_output
        self._backoff = Backoff(settings.patience_s)
        self._done: set[int] = set()
        self._n_failed = self._n_tokens = 0
        self._state: bytes | None = None
        self._begun_s = time.monotonic()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._journal = stack.enter_context(contextlib.closing(self._open_journal()))
            if not self._journal.locked:
                print_line(f"{self._journal.path}: no locks on this file system: nothing keeps a second run out")
            self._errors = stack.enter_context(_open_errors(self._settings.errors))
            self._replay()
            self._n_resumed, self._n_tokens_before = len(self._done), self._n_tokens
            bar = tqdm(total=self._text.n_tokens, initial=self._n_tokens, unit="tok", unit_scale=True, disable=None)
            self._bar = stack.enter_context(bar)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def embed_in_batches(self, client: AsyncTransportClient) -> None:
        """Send several requests at a time, whose responses come in any order."""
        batches = self._batches()  # shared: each worker takes the next one

        async def work() -> None:
            for batch in batches:
                await self._embed_batch(client, batch)

        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._settings.concurrency):
                    workers.create_task(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def embed_in_order(self, client: AsyncTransportClient) -> None:
        """Send one line after another, each starting from the state of the one before."""
        while True:
            try:
                await self._stream_remaining(client)
            except PASSING as error:
                await self._backoff.wait(error)
                self._journal.rewind_to_state()
                self._replay()
            else:
                return

    def finish(self) -> Summary:
        """Make the output from the journal, which is removed then."""
        self._journal.flush()
        embedded: set[int] = set()
        sentences = {line.index: line.text for line in self._text.lines()} if self._needs_sentences else {}
        with self._open_output(self._settings.output, self._identity) as (write, write_sentences):
            for record in self._journal.records():
                if record.vectors is not None:
                    key = sentences[record.index] if self._settings.use_sentence_keys else str(record.index)
                    write(key, record.vectors)
                    embedded.add(record.index)
            if len(embedded) + self._n_failed != self._text.n_lines:
                raise UsageError(f"{self._journal.path}: not what the input has; one of the two has been changed")
            if not (self._settings.forget_sentences or self._settings.use_sentence_keys):
                write_sentences({text: str(index) for index, text in sentences.items() if index in embedded})
        self._journal.path.unlink()
        return Summary(
            n_embedded=len(embedded),
            n_failed=self._n_failed,
            n_resumed=self._n_resumed,
            n_tokens=self._n_tokens - self._n_tokens_before,
            seconds=time.monotonic() - self._begun_s,
        )

    @property
    def _needs_sentences(self) -> bool:
        return self._settings.use_sentence_keys or not self._settings.forget_sentences

    # ---- what is there already ----

    def _open_journal(self) -> Journal:
        path = _journal_path(self._settings)
        if not (self._settings.resume and path.exists() and path.stat().st_size):  # empty: nothing has been kept
            return Journal.create(path, self._identity)
        with contextlib.ExitStack() as stack:
            journal = stack.enter_context(contextlib.closing(Journal.reopen(path)))
            check_same_run(path, journal.identity, self._identity)
            if self._settings.carry_state:
                journal.rewind_to_state()
            stack.pop_all()
        return journal

    def _replay(self) -> None:
        """Read from the journal what has been done, and write the list of errors anew from it."""
        self._done.clear()
        self._n_failed = self._n_tokens = 0
        self._state = None
        if self._errors is not None:
            self._errors.seek(0)
            self._errors.truncate()
        for record in self._journal.records():
            self._account(record)

    def _account(self, record: JournalRecord) -> None:
        self._done.add(record.index)
        self._n_tokens += record.n_tokens
        self._state = record.state or self._state
        if record.vectors is None:
            self._n_failed += 1
            if self._errors is None:  # an earlier run had a list, this one has none
                raise _bad_line(record)
            line = {"line": record.index + 1, "reason": record.reason, "message": record.message}
            with naming(Path(self._errors.name)):
                self._errors.write(json.dumps(line) + "\n")
                self._errors.flush()

    # ---- lines in, records out ----

    def _remaining(self) -> Iterator[Line]:
        return (line for line in self._text.lines() if line.index not in self._done)

    def _batches(self) -> Iterator[list[Line]]:
        batch: list[Line] = []
        n_tokens = 0
        for line in self._remaining():
            if batch and n_tokens + line.n_tokens > self._settings.batch_tokens:
                yield batch
                batch, n_tokens = [], 0
            batch.append(line)
            n_tokens += line.n_tokens
        if batch:
            yield batch

    async def _embed_batch(self, client: AsyncTransportClient, batch: list[Line]) -> None:
        good = [line for line in batch if not line.error]
        for line in batch:
            if line.error:
                self._fail(line, _BAD_LINE, line.error)
        while good:
            try:
                results = await client.embed(
                    [self._sentence(line) for line in good],
                    layers=self._settings.layers,
                    pool=self._settings.pool,
                    dtype=self._settings.dtype,
                    priority=self._settings.priority,
                    on_error="return",
                )
            except PASSING as error:
                await self._backoff.wait(error)
            else:
                self._backoff.reset()
                for line, result in zip(good, results, strict=True):
                    self._keep(line, result)
                break
        self._journal.flush()

    async def _stream_remaining(self, client: AsyncTransportClient) -> None:
        lines: list[Line] = []  # sent, without a result
        last: list[Line] = []  # the bad line at which the run stops

        def sentences() -> Iterator[str | list[str]]:
            for line in self._remaining():
                if not line.error:
                    lines.append(line)
                    yield self._sentence(line)
                elif self._errors is not None:
                    self._fail(line, _BAD_LINE, line.error)
                else:
                    last.append(line)  # reported when the results of all lines before it are kept
                    return

        results = client.embed_stream(
            sentences(),
            layers=self._settings.layers,
            pool=self._settings.pool,
            dtype=self._settings.dtype,
            priority=self._settings.priority,
            on_error="return",
            carry_state=True,
            initial_state=self._state,
            return_state_every=_STATE_EVERY,
            timeout_s=self._settings.timeout_s,
        )
        async with contextlib.aclosing(results):
            async for result in results:
                self._backoff.reset()
                self._keep(lines.pop(0), result)
                self._journal.flush()
        for line in last:
            self._fail(line, _BAD_LINE, line.error)

    def _sentence(self, line: Line) -> str | list[str]:
        return line.text if self._settings.raw else line.text.split()

    def _keep(self, line: Line, result: Embedding | SentenceError) -> None:
        if isinstance(result, SentenceError):
            self._fail(line, result.reason or result.code.name, result.message)
            return
        self._record(JournalRecord(line.index, len(result.tokens), result.vectors, state=result.state or b""), line)

    def _fail(self, line: Line, reason: str, message: str) -> None:
        record = JournalRecord(line.index, 0, None, reason=reason, message=message)
        if self._errors is None:
            raise _bad_line(record)
        self._record(record, line)

    def _record(self, record: JournalRecord, line: Line) -> None:
        self._journal.append(record)
        self._account(record)
        self._bar.update(line.n_tokens)


def _bad_line(record: JournalRecord) -> BadLineError:
    hint = "--errors FILE lists bad lines and goes on"
    return BadLineError(f"line {record.index + 1}: {record.reason}: {record.message} ({hint})")


@contextlib.contextmanager
def _open_errors(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
    else:
        file = path.open("w", encoding="utf-8")
        try:
            yield file
        finally:
            with naming(path):
                file.close()
