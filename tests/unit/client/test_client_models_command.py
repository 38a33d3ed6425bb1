"""`bilm-models`."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client.cli.models import main, table
from bilm_client.results import ModelInfo
from bilm_client.testing import FakeModel

from tests.support.scripted import Scripted, abort, running_scripted

Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; its exit code, and the lines of its output and of its errors."""

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


@pytest.fixture
def other() -> Iterator[Scripted]:
    with running_scripted() as one:
        yield one


def refusing_reload(code: grpc.StatusCode, reason: str) -> Callable[[Any], pb.ReloadResponse]:
    def act(context: Any) -> pb.ReloadResponse:
        abort(context, code, reason)
        raise AssertionError

    return act


def model(**fields: Any) -> ModelInfo:
    described = FakeModel().description()
    described.MergeFrom(pb.GetModelResponse(**fields))
    return ModelInfo.from_proto(described)


# ---- list ----


def test_the_table_fits_a_terminal() -> None:
    default = model(
        name="wikitext2-mini",
        version="59de42a2ed2af91b",
        width=256,
        parameter_count=4_612_345,
        precision="bfloat16",
        tokenizer="moses-en (sacremoses 0.1.1)",
    )
    original = model(name="original", version="0123456789abcdef", width=1024, parameter_count=93_600_864)
    both = model(name="both", version="fedcba9876543210", width=1280, members=["wikitext2-mini", "original"])
    assert list(table([default, both, original])) == [
        "  NAME            VERSION           LAYERS  WIDTH  PARAMS  PRECISION  TOKENIZER",
        "* wikitext2-mini  59de42a2ed2af91b       3    256   4.6 M  bfloat16   moses-en",
        "  both            fedcba9876543210       3   1280       0  float32    whitespace",
        "    the vectors of wikitext2-mini + original",
        "  original        0123456789abcdef       3   1024  93.6 M  float32    whitespace",
        "* the default model",
    ]
    assert max(map(len, table([default, both, original]))) <= 80


def test_listing(scripted: Scripted, run: Run) -> None:
    scripted.service.serve(FakeModel("en"), FakeModel("nl", layer_count=2), FakeModel("de", width=8))
    code, lines, errors = run("list", "--target", scripted.target)
    assert (code, errors) == (0, [])
    assert [line.split()[:-5] for line in lines[:-1]] == [
        ["NAME", "VERSION"],
        ["*", "en", "en-1"],
        ["de", "de-1"],
        ["nl", "nl-1"],
    ]
    code, lines, errors = run("list", "--target", scripted.target, "--json")
    assert (code, errors) == (0, [])
    described = json.loads("\n".join(lines))
    assert [(each["default"], each["name"], each["width"]) for each in described] == [
        (True, "en", 16),
        (False, "de", 8),
        (False, "nl", 16),
    ]
    assert described[0]["limits"]["max_tokens_per_request"] == 16384


def test_a_server_that_can_not_be_reached(run: Run, tmp_path: Path) -> None:
    for command in ("list", "reload"):
        code, lines, errors = run(command, "--target", f"unix:{tmp_path}/nobody", "--timeout-s", "5")
        assert (code, lines) == (1, [])
        assert "UNAVAILABLE" in errors[0]


def test_a_server_without_a_list_is_of_an_earlier_version(run: Run) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        code, lines, errors = run("list", "--target", f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
    assert (code, lines) == (1, [])
    assert "UNIMPLEMENTED" in errors[0]
    assert "Client.model_info()" in errors[1]


def test_what_can_not_be_used_is_named(run: Run, tmp_path: Path) -> None:
    for flags, expected in (
        (("--token-file", f"{tmp_path}/none"), "none: "),
        (("--target", "bilm-1:1,bilm-2:1"), "expected IPV4:PORT"),
        (("--target", ""), "target must be an address"),
    ):
        for command in ("list", "reload"):
            code, lines, errors = run(command, *flags)
            assert (code, lines) == (2, [])
            assert expected in errors[0]


@pytest.mark.parametrize("arguments", [(), ("unload",), ("reload", "--json"), ("list", "--timeout-s", "0")])
def test_bad_arguments(arguments: tuple[str, ...], run: Run) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)


# ---- reload ----


def test_a_reload_prints_what_has_changed(scripted: Scripted, run: Run, tmp_path: Path) -> None:
    scripted.admin.acts.append(lambda _context: pb.ReloadResponse(added=["de", "fr"], removed=["nl"], kept=["en"]))
    (token := tmp_path / "token").write_text("a-secret\n", encoding="utf-8")
    code, lines, errors = run("reload", "--target", scripted.target, "--token-file", str(token))
    assert (code, lines, errors) == (0, ["added: de, fr", "removed: nl", "kept: en"], [])
    assert scripted.admin.metadata["authorization"] == "Bearer a-secret"


@pytest.mark.parametrize(
    ("code", "reason", "advice"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "RIGHT_MISSING", 'rights = ["reload"] in [[callers]]'),
        (grpc.StatusCode.FAILED_PRECONDITION, "RELOAD_FAILED", "nothing has changed"),
        (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "--token-file"),
        (grpc.StatusCode.UNIMPLEMENTED, "METHOD_NOT_FOUND", "send SIGHUP"),
        (grpc.StatusCode.UNIMPLEMENTED, "", "send SIGHUP"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "bilm-models list"),
    ],
)
def test_a_refusal_says_what_to_do(
    scripted: Scripted, run: Run, code: grpc.StatusCode, reason: str, advice: str
) -> None:
    scripted.admin.acts.append(refusing_reload(code, reason))
    found, lines, errors = run("reload", "--target", scripted.target)
    assert (found, lines) == (1, [])
    named = f"{code.name} ({reason})" if reason else code.name
    assert errors[0] == f"bilm-models: {scripted.target}: {named}: as scripted"
    assert errors[1].startswith("bilm-models: ")
    assert advice in errors[1]


def test_another_refusal_needs_no_advice(scripted: Scripted, run: Run) -> None:
    scripted.admin.acts.append(refusing_reload(grpc.StatusCode.INTERNAL, "INTERNAL"))
    code, _, errors = run("reload", "--target", scripted.target)
    assert (code, len(errors)) == (1, 1)


def test_several_servers_reload_one_after_another(scripted: Scripted, other: Scripted, run: Run) -> None:
    targets = f"{scripted.target},{other.target}"
    for server in (scripted, other):
        server.admin.acts.append(lambda _context: pb.ReloadResponse(replaced=["en"]))
    code, lines, _ = run("reload", "--target", targets)
    assert code == 0
    assert lines == [f"ipv4:{server.target}: replaced: en" for server in (scripted, other)]


def test_the_first_that_refuses_ends_it(scripted: Scripted, other: Scripted, run: Run) -> None:
    scripted.admin.acts.append(refusing_reload(grpc.StatusCode.FAILED_PRECONDITION, "RELOAD_FAILED"))
    other.admin.acts.append(lambda _context: pb.ReloadResponse(replaced=["en"]))
    code, lines, errors = run("reload", "--target", f"{scripted.target},{other.target}")
    assert (code, lines) == (1, [])
    assert scripted.target in errors[0]
    assert len(other.admin.acts) == 1
