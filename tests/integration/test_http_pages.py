"""/metrics and /openapi.json on a real server: the document is held against what is served."""

from collections.abc import Iterator
from typing import Any

import pytest
from bilm_server.protocols.http.routing import OPEN_PATHS, ROUTES

from tests.support.http_calls import call, embeddings
from tests.support.servers import LoopServer, serving


@pytest.fixture(scope="module")
def server() -> Iterator[LoopServer]:
    with serving("--http-listen", "127.0.0.1:0") as server:
        yield server


@pytest.fixture
def address(server: LoopServer) -> str:
    return server.http.address


def test_metrics(server: LoopServer, address: str) -> None:
    embeddings(address, {"input": "a b"})
    answer = call(address, "GET", "/metrics", headers={"accept": "text/plain;version=0.0.4"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in answer.body.decode().splitlines() if not line.startswith("#"))
    labels = f'code="OK",method="http/embeddings",model="{server.model.name}"'
    assert float(lines[f"bilm_requests_total{{{labels}}}"]) >= 1
    assert lines["bilm_health_serving"] == "1.0"
    openmetrics = call(address, "GET", "/metrics", headers={"accept": "application/openmetrics-text"})
    assert openmetrics.body.endswith(b"# EOF\n")


def test_the_openapi_document_is_what_is_served(server: LoopServer, address: str) -> None:
    found = call(address, "GET", "/openapi.json").json
    paths = {path.replace("{name}", "") for path in found["paths"]}
    assert paths == {*ROUTES, *OPEN_PATHS}
    bodies = {"/v1/embed": {"sentences": [{"text": "a"}]}}
    for path, methods in found["paths"].items():
        (method,) = methods
        asked = bodies.get(path, {"input": "a"}) if method == "post" else None
        answer = call(address, method.upper(), path.replace("{name}", server.model.name), asked)
        assert (path, answer.status) == (path, 200)
        content = methods[method]["responses"]["200"]["content"]
        schema = content.get("application/json", {}).get("schema")
        if schema is not None:
            check_schema(answer.json, schema, found["components"]["schemas"])
    refused = embeddings(address, {"input": ""}).json
    check_schema(refused, {"$ref": "#/components/schemas/Error"}, found["components"]["schemas"])


def test_the_openapi_document_has_the_fields_that_requests_may_have(address: str) -> None:
    schemas = call(address, "GET", "/openapi.json").json["components"]["schemas"]
    options = schemas["EmbedRequest"]["properties"]["options"]
    sentence = schemas["EmbedRequest"]["properties"]["sentences"]["items"]
    mix = options["properties"]["mix"]
    for path, known, body in (
        ("/v1/embeddings", schemas["EmbeddingsRequest"], {"?": 1}),
        ("/v1/embed", schemas["EmbedRequest"], {"?": 1}),
        ("/v1/embed", options, {"options": {"?": 1}}),
        ("/v1/embed", mix, {"options": {"layers": "mix", "mix": {"?": 1}}}),
        ("/v1/embed", sentence, {"sentences": [{"?": 1}]}),
    ):
        message = call(address, "POST", path, body).message
        listed = message.partition("(expected ")[2].removesuffix(")").split(", ")
        assert set(listed) == known["properties"].keys()


def check_schema(value: Any, schema: dict[str, Any], named: dict[str, Any]) -> None:
    """Compare a value with as much of JSON Schema as the document has in responses."""
    if "$ref" in schema:
        schema = named[schema["$ref"].rpartition("/")[2]]
    if "oneOf" in schema:
        assert any(_fits(value, one, named) for one in schema["oneOf"]), (value, schema)
        return
    if "const" in schema:
        assert value == schema["const"]
    if "enum" in schema:
        assert value in schema["enum"]
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "null": type(None),
    }
    names = schema.get("type", [])
    types = tuple({**kinds, "number": (int, float)}[name] for name in ([names] if isinstance(names, str) else names))
    assert not types or isinstance(value, types), (value, schema)
    if schema.get("type") == "array":
        for item in value:
            check_schema(item, schema["items"], named)
    if schema.get("type") == "object":
        assert value.keys() >= set(schema["required"])
        properties = schema.get("properties", {})
        assert schema.get("additionalProperties", True) or value.keys() <= properties.keys()
        for name in value.keys() & properties.keys():
            check_schema(value[name], properties[name], named)


def _fits(value: Any, schema: dict[str, Any], named: dict[str, Any]) -> bool:
    try:
        check_schema(value, schema, named)
    except AssertionError:
        return False
    return True
