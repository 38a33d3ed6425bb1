"""`bilm-bench`: from the command line to a run, and its end to an exit code."""

import asyncio
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bilm_client.errors import BilmError
from bilm_system.files import write_text
from bilm_system.terminal import run_command

if TYPE_CHECKING:
    from bilm_bench.reporting.report import Report
    from bilm_bench.settings import BenchSettings
    from bilm_bench.statistics.counters import StepCounters
    from bilm_bench.workload.schedule import Step

DONE, VIOLATED, UNUSABLE, STOPPED, INTERRUPTED = 0, 1, 2, 3, 130
_MISSING = "bilm-bench: needs the extra `bench`: pip install 'bilm-serve[bench]'"


def main(argv: list[str] | None = None) -> int:
    """Put a server under load.

    Returns:
        0 when the run was done, 1 if a condition of --fail-on is violated or an answer was wrong, 2 if it can't be run
        as asked for, 3 if the server can't be reached or a file or standard output can't be written, 130 after Ctrl-C,
        141 if nobody reads what is printed.
    """
    return run_command("bilm-bench", partial(_main, sys.argv[1:] if argv is None else argv), failed=STOPPED)


def _main(argv: list[str]) -> int:
    try:
        from bilm_client.cli.settings_sources import UsageError  # noqa: PLC0415 - without the extra, say what to install

        from bilm_bench.settings import load_settings  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name in ("pydantic", "pydantic_settings", "tqdm"):
            return _fail(_MISSING, UNUSABLE)
        raise
    try:
        return _run(load_settings(argv))
    except UsageError as error:
        return _fail("\n".join(f"bilm-bench: {line}" for line in str(error).splitlines()), UNUSABLE)
    except (BilmError, OSError) as error:
        return _fail(f"bilm-bench: {error}", STOPPED)
    except KeyboardInterrupt:
        return _fail("bilm-bench: interrupted before the load began", INTERRUPTED)


def _run(settings: "BenchSettings") -> int:
    from bilm_client.cli.settings_sources import UsageError  # noqa: PLC0415 - see main

    from bilm_bench.reporting.report import is_violated, make_report  # noqa: PLC0415
    from bilm_bench.reporting.summary import summary  # noqa: PLC0415
    from bilm_bench.resources import check_readable  # noqa: PLC0415
    from bilm_bench.run import measure, server_reader  # noqa: PLC0415
    from bilm_bench.workload.texts import read_sentences  # noqa: PLC0415

    if settings.html_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("html: needs matplotlib, of the extra `bench`: pip install 'bilm-serve[bench]'")
    if (reader := server_reader(settings)) is not None:
        check_readable(reader, "metrics_url" if settings.metrics_url else "server_pid")
    sentences = read_sentences(settings.text, running=settings.running, raw=settings.raw, at_most=settings.sentences)
    measured = asyncio.run(measure(settings, sentences, partial(_print_step, settings.loop)))
    report = make_report(settings, sentences, measured)
    try:
        _write(report, settings.json_file, settings.html_file)
    finally:  # of a report that can't be written, this is left
        print(summary(report), flush=True)
    if measured.interrupted:
        return INTERRUPTED
    return VIOLATED if is_violated(report) else DONE


def _write(report: "Report", json_file: Path | None, html_file: Path | None) -> None:
    """Write both files, even if the first can't be written."""
    try:
        if json_file is not None:
            write_text(json_file, json.dumps(report, indent=1, ensure_ascii=False) + "\n", "backslashreplace")
    finally:
        if html_file is not None:
            from bilm_bench.reporting.load_page import load_page  # noqa: PLC0415 - matplotlib takes a second to load

            write_text(html_file, load_page(report), "backslashreplace")


def _print_step(loop: str, step: "Step", counters: "StepCounters") -> None:
    from tqdm import tqdm  # noqa: PLC0415 - see main

    from bilm_bench.reporting.summary import step_line  # noqa: PLC0415

    tqdm.write(f"bilm-bench: {step_line(step, counters, loop)}", file=sys.stderr)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
