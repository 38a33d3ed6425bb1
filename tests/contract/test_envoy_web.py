"""Callers that speak no gRPC, through a real Envoy with `deploy/envoy/envoy-web.yaml`: JSON over HTTP, and browsers."""

import base64
import functools
import http.server
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from bilm_api.v1 import embed_pb2
from bilm_client import Client

from tests.fault.balancer_support import free_ports, poll, program
from tests.support.server_processes import ProcessServer

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "envoy" / "envoy-web.yaml"
DESCRIPTOR_SET = Path(embed_pb2.__file__).with_name("embed.binpb")
TOKENS = ["héllo", "wörld"]
SENTENCE = {"tokens": {"tokens": TOKENS}}
NPM = ("@connectrpc/connect@2.1", "@connectrpc/connect-web@2.1", "@bufbuild/protobuf@2", "esbuild@0.25")
INSTALL_S, BROWSER_S = 300.0, 60.0


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        status: of HTTP.
        headers: with names in any case.
        body: as it came.
    """

    status: int
    headers: Message
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Web:
    """Envoy before a server.

    Attributes:
        target: of the server itself.
        url: of Envoy.
        page_port: pages from there may call.
    """

    target: str
    url: str
    page_port: int

    def send(self, method: str, data: bytes, headers: dict[str, str], http_method: str = "POST") -> Reply:
        url = f"{self.url}/bilm_api.v1.EmbedService/{method}"
        request = urllib.request.Request(url, data, headers, method=http_method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return Reply(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.headers, error.read())

    def call(self, method: str, message: Any, **headers: str) -> Reply:
        return self.send(method, json.dumps(message).encode(), {"Content-Type": "application/json", **headers})


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    envoy = program("envoy")
    with ProcessServer("--max-tokens-per-request", "100") as server, tempfile.TemporaryDirectory() as folder:
        port, admin_port, page_port = free_ports(3)
        config = yaml.safe_load(CONFIG.read_text())
        _adapt(config, port, admin_port, page_port, server.target)
        path, log = Path(folder) / "envoy.json", Path(folder) / "envoy.log"
        path.write_text(json.dumps(config))
        with log.open("wb") as output:
            command = [envoy, "--use-dynamic-base-id", "--concurrency", "1", "-c", str(path)]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            found = Web(server.target, f"http://127.0.0.1:{port}", page_port)
            poll("Envoy with a healthy server", lambda: _answers(found, process, log), 60)
            yield found
        finally:
            process.kill()
            process.wait()


def _adapt(config: Any, port: int, admin_port: int, page_port: int, target: str) -> None:
    """Set what a deployment sets: the addresses, the pages that may call, where the descriptor set is."""
    resources = config["static_resources"]
    config["admin"]["address"]["socket_address"]["port_value"] = admin_port
    [listener], [cluster] = resources["listeners"], resources["clusters"]
    listener["address"]["socket_address"]["port_value"] = port
    [manager] = listener["filter_chains"][0]["filters"]
    typed = manager["typed_config"]
    [host] = typed["route_config"]["virtual_hosts"]
    cors = host["typed_per_filter_config"]["envoy.filters.http.cors"]
    cors["allow_origin_string_match"] = [{"exact": f"http://localhost:{page_port}"}]
    [transcoder] = [each for each in typed["http_filters"] if each["name"].endswith("grpc_json_transcoder")]
    assert Path(transcoder["typed_config"]["proto_descriptor"]).name == DESCRIPTOR_SET.name
    transcoder["typed_config"]["proto_descriptor"] = str(DESCRIPTOR_SET)
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["address"]["socket_address"]["port_value"] = int(target.rpartition(":")[2])


def _answers(web: Web, process: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return web.call("GetModel", {}).status == 200
    except urllib.error.URLError:  # not listening yet
        return False


def floats(tensor: Any) -> Any:
    return np.frombuffer(base64.b64decode(tensor["data"]), "<f4").reshape(tensor["shape"])


def expected_vectors(web: Web) -> Any:
    with Client(web.target) as client:
        (expected,) = client.embed([TOKENS], layers="top")
    return expected.vectors


# ---- JSON ----


def test_json_has_the_same_bits(web: Web) -> None:
    sentences = [SENTENCE, {"tokens": {"tokens": [""]}}]
    reply = web.call("Embed", {"options": {"layers": "LAYERS_TOP"}, "sentences": sentences})
    assert reply.status == 200
    found, refused = reply.content["results"]
    assert found["embedding"]["tokens"] == TOKENS
    assert np.array_equal(floats(found["embedding"]["tensor"]), expected_vectors(web))
    assert refused["error"]["details"][0]["reason"] == "TOKEN_EMPTY"
    assert reply.content["usage"]["tokens"] == "2"  # 64 bits are text in JSON


def test_json_streams_are_arrays(web: Web) -> None:
    start = {"start": {"options": {"layers": "LAYERS_TOP"}}}
    items = [{"item": {"id": str(number), "sentence": SENTENCE}} for number in range(3)]
    replies = web.call("EmbedStream", [start, *items]).content
    assert sorted(reply.get("id", "0") for reply in replies) == ["0", "1", "2"]  # 0 is left out in JSON
    for reply in replies:
        assert np.array_equal(floats(reply["rows"]["embedding"]["tensor"]), expected_vectors(web))


@pytest.mark.parametrize(
    ("message", "status", "reason"),
    [
        ({"model": "other", "sentences": [SENTENCE]}, 404, "MODEL_NOT_FOUND"),
        ({"options": {"layers": 99}, "sentences": [SENTENCE]}, 400, "LAYERS_INVALID"),
        ({"sentences": [{"tokens": {"tokens": ["a"] * 200}}]}, 400, "TOO_MANY_TOKENS"),
    ],
)
def test_refusals_have_their_reason(web: Web, message: Any, status: int, reason: str) -> None:
    reply = web.call("Embed", message)
    assert reply.status == status
    [detail] = [each for each in reply.content["details"] if each["@type"].endswith("ErrorInfo")]
    assert (detail["reason"], detail["domain"]) == (reason, "bilm-serve")


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"options": {"layers": "NO"}}', b'{"sentences": 7}', b"\xff"])
def test_what_is_no_message_is_a_bad_request(web: Web, body: bytes) -> None:
    assert web.send("Embed", body, {"Content-Type": "application/json"}).status == 400


def test_other_methods_are_not_there(web: Web) -> None:
    assert web.call("Nothing", {}).status == 404
    assert web.send("Embed", b"", {}, "GET").status in (404, 405)


# ---- browsers ----


def preflight(web: Web, origin: str) -> Reply:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-grpc-web",
    }
    return web.send("Embed", b"", headers, "OPTIONS")


def test_only_named_pages_may_call(web: Web) -> None:
    own, foreign = f"http://localhost:{web.page_port}", "http://localhost.example"
    allowed = preflight(web, own)
    assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, own)
    assert "access-control-allow-origin" not in preflight(web, foreign).headers
    reply = web.call("GetModel", {}, Origin=own)
    assert "grpc-retry-pushback-ms" in reply.headers["access-control-expose-headers"].split(",")


def test_grpc_web(web: Web) -> None:
    request = embed_pb2.EmbedRequest(
        options=embed_pb2.EmbedOptions(layers=embed_pb2.LAYERS_TOP),
        sentences=[embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=TOKENS))],
    ).SerializeToString()
    framed = b"\0" + len(request).to_bytes(4, "big") + request
    reply = web.send("Embed", framed, {"Content-Type": "application/grpc-web+proto", "X-Grpc-Web": "1"})
    length = int.from_bytes(reply.body[1:5], "big")
    [result] = embed_pb2.EmbedResponse.FromString(reply.body[5 : 5 + length]).results
    assert result.embedding.tensor.data == expected_vectors(web).tobytes()
    trailer = reply.body[5 + length :]
    assert trailer[0] == 0x80
    assert b"grpc-status:0" in trailer


@contextmanager
def pages(folder: Path, port: int) -> Iterator["queue.Queue[Any]"]:
    """Serve a folder; give what its pages send back."""
    found: queue.Queue[Any] = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def browser(url: str, profile: Path) -> Iterator[None]:
    """Show a page in Chromium."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    command = [program("chromium"), *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0", url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_connect_web_in_chromium(web: Web, tmp_path: Path) -> None:
    for name in ("chromium", "node", "npm"):
        program(name)
    _run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path), *NPM)
    page = tmp_path / "page"
    page.mkdir()
    shutil.copy(DESCRIPTOR_SET, page)
    source = shutil.copy(ROOT / "tests" / "contract" / "embed_web.js", tmp_path)
    esbuild = str(tmp_path / "node_modules" / ".bin" / "esbuild")
    _run(esbuild, str(source), "--bundle", "--format=esm", f"--outfile={page / 'embed_web.js'}")
    (page / "index.html").write_text("<!doctype html><title></title><script type=module src=embed_web.js></script>")
    query = urllib.parse.urlencode({"target": web.url})
    url = f"http://localhost:{web.page_port}/?{query}"
    with pages(page, web.page_port) as found, browser(url, tmp_path / "profile"):
        said = found.get(timeout=BROWSER_S)
    assert "failed" not in said, said
    assert (said["tokens"], said["shape"], said["code"]) == (TOKENS, [2, 16], 5)
    assert "random-tiny" in said["said"]
    assert np.array_equal(np.array(said["vectors"], np.float32).reshape(2, 16), expected_vectors(web))


def _run(*command: str) -> None:
    found = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CI": "1"}, timeout=INSTALL_S, check=False
    )
    if found.returncode:
        pytest.skip(f"{command[0]} failed: {found.stderr.strip().splitlines()[-1:]}")
