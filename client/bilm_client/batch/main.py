"""`bilm-embed`: from the command line to a run, and its end to an exit code."""

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING

from bilm_system.files import message
from bilm_system.terminal import run_command

from bilm_client.errors import BilmError

if TYPE_CHECKING:
    from bilm_client.batch.pipeline import OpenClients

_MISSING = "bilm-embed: needs the extra `files`: pip install 'bilm-serve[files]'"


def main(argv: list[str] | None = None, open_clients: "OpenClients | None" = None) -> int:
    """Embed a file.

    Args:
        argv: The command line; None: the process's.
        open_clients: Returns what makes clients; None: of the server at `--target`.

    Returns:
        0 when the output is whole, 1 if the run stopped before (it can be resumed) or standard output can't be written,
        2 if it can't be run as asked for, 130 after Ctrl-C, 141 if nobody reads what is printed.
    """
    return run_command("bilm-embed", partial(_main, sys.argv[1:] if argv is None else argv, open_clients))


def _main(argv: list[str], open_clients: "OpenClients | None") -> int:
    try:
        from bilm_client.batch.pipeline import Summary, embed_file, remote_clients  # noqa: PLC0415
        from bilm_client.batch.reader import open_input  # noqa: PLC0415 - without the extra, say what to install
        from bilm_client.batch.settings import load_settings  # noqa: PLC0415
        from bilm_client.cli.settings_sources import UsageError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name in ("h5py", "pydantic", "pydantic_settings", "tqdm"):
            return _fail(_MISSING, 2)
        raise

    def report(summary: Summary | None, output: object) -> None:
        if summary is None:
            print(f"{output}: whole already")
            return
        speed = summary.n_tokens / max(summary.seconds, 1e-9)
        resumed = f", {summary.n_resumed:,} of them by an earlier run" if summary.n_resumed else ""
        failed = f", {summary.n_failed:,} failed" if summary.n_failed else ""
        print(
            f"{output}: {summary.n_embedded:,} sentences{failed}{resumed}; "
            f"{summary.n_tokens:,} tokens in {summary.seconds:.1f} s, {speed:,.0f} tokens/s"
        )

    try:
        settings = load_settings(argv)
        with open_input(settings) as text:
            summary = asyncio.run(embed_file(settings, text, open_clients=open_clients or remote_clients))
            report(summary, settings.output)
    except UsageError as error:
        return _fail("\n".join(f"bilm-embed: {line}" for line in str(error).splitlines()), 2)
    except (BilmError, OSError) as error:
        return _fail(
            f"bilm-embed: {message(error)}\nbilm-embed: the run stopped; what is done is kept, --resume goes on", 1
        )
    except KeyboardInterrupt:
        return _fail("bilm-embed: interrupted; what is done is kept, --resume goes on", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
