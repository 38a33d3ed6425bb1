"""/openapi.json: the HTTP endpoints as an OpenAPI document."""

from typing import Any, Final

import orjson

import bilm_server
from bilm_server.protocols.http.messages import JSON, HttpRequest, HttpResponse

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_FLAG: Final[Schema] = {"type": "boolean", "default": False}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_BASE64: Final[Schema] = {"type": "string", "contentEncoding": "base64"}
_ENCODING: Final[Schema] = {"enum": ["float", "base64"], "default": "float"}
_PRIORITY: Final[Schema] = {"enum": ["interactive", "batch"], "default": "interactive"}


class OpenApi:
    """The endpoint; it needs no model."""

    def __init__(self) -> None:
        """Write the document."""
        self._body = orjson.dumps(document())

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Return the document."""
        return HttpResponse(self._body)


def document() -> Schema:
    """Return the document, OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "bilm-serve", "version": bilm_server.__version__},
        "security": [{}, {"token": []}],
        "paths": {
            "/v1/embeddings": {"post": _posted("EmbeddingsRequest", _json("Embeddings"))},
            "/embeddings": {"post": _posted("EmbeddingsRequest", _json("Embeddings"))},
            "/v1/embed": {"post": _posted("EmbedRequest", {**_json("EmbedResponse"), "application/octet-stream": {}})},
            "/v1/models": {"get": _got(_json("Models"))},
            "/v1/models/{name}": {
                "get": {
                    "parameters": [{"name": "name", "in": "path", "required": True, "schema": _TEXT}],
                    **_got(_json("Model")),
                }
            },
            "/metrics": {"get": _got({"text/plain": {}})},
            "/openapi.json": {"get": _got({JSON: {}})},
            "/healthz": {"get": {"security": [{}], **_got({"text/plain": {}})}},
            "/readyz": {"get": {"security": [{}], **_got({"text/plain": {}})}},
        },
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}, "schemas": _schemas()},
    }


def _schemas() -> dict[str, Schema]:
    return {
        "EmbeddingsRequest": _object(
            ["input"],
            input={"oneOf": [{**_TEXT, "minLength": 1}, _list({**_TEXT, "minLength": 1})]},
            model=_TEXT,
            encoding_format=_ENCODING,
            dimensions=_COUNT,
            user=_TEXT,
            layers={"enum": ["top", "average"], "default": "top"},
            pooling={"enum": ["mean", "max"], "default": "mean"},
            l2_normalize=_FLAG,
            priority=_PRIORITY,
        ),
        "Embeddings": _object(
            ["object", "data", "model", "usage"],
            object={"const": "list"},
            data=_list(
                _object(
                    ["object", "index", "embedding"],
                    object={"const": "embedding"},
                    index=_COUNT,
                    embedding={"oneOf": [_list({"type": "number"}), _BASE64]},
                )
            ),
            model=_TEXT,
            usage=_object(["prompt_tokens", "total_tokens"], prompt_tokens=_COUNT, total_tokens=_COUNT),
        ),
        "EmbedRequest": _object(
            ["sentences"],
            model=_TEXT,
            expected_model_version=_TEXT,
            options=_options(),
            sentences=_list(_sentence()),
            encoding_format=_ENCODING,
            priority=_PRIORITY,
        ),
        "EmbedResponse": _embed_response(),
        "Model": {"type": "object", "required": ["id", "object", "created", "owned_by", "version", "width", "limits"]},
        "Models": _object(["object", "data"], object={"const": "list"}, data=_list(_named("Model"))),
        "Error": _object(
            ["error"],
            error=_object(
                ["message", "type", "param", "code"],
                message=_TEXT,
                type=_TEXT,
                param={"type": ["string", "null"]},
                code=_TEXT,
            ),
        ),
    }


def _sentence() -> Schema:
    pair = {**_list(_COUNT), "minItems": 2, "maxItems": 2}
    return _object(
        [],
        text=_TEXT,
        tokens=_list({**_TEXT, "minLength": 1}),
        state=_BASE64,
        return_state=_FLAG,
        rows={**_list(_COUNT), "minItems": 1},
        spans={**_list(pair), "minItems": 1},
        span_unit={"enum": ["tokens", "bytes"], "default": "tokens"},
    )


def _options() -> Schema:
    return _object(
        [],
        layers={"enum": ["all", "top", "average", "mix"], "default": "all"},
        mix=_object(["weights"], weights=_list({"type": "number"}), gamma={"type": "number"}, layer_norm=_FLAG),
        pooling={"enum": ["none", "mean", "max"], "default": "none"},
        l2_normalize=_FLAG,
        data_type={"enum": ["float32", "float16", "bfloat16"], "default": "float32"},
        omit_tokens=_FLAG,
    )


def _embed_response() -> Schema:
    tensor = _object(
        ["shape", "data_type", "data"],
        shape=_list(_COUNT),
        data_type={"enum": ["float32", "float16", "bfloat16"]},
        data={"oneOf": [_list({}), _BASE64]},
    )
    embedding = _object(
        ["truncated", "tensor"],
        tokens=_list(_TEXT),
        token_starts=_list(_COUNT),
        token_ends=_list(_COUNT),
        truncated={"type": "boolean"},
        tensor=tensor,
        state=_BASE64,
    )
    result = {"oneOf": [_object(["embedding"], embedding=embedding), _named("Error")]}
    usage = _object(
        ["queue_seconds", "inference_seconds", "tokens", "model_version"],
        queue_seconds={"type": "number"},
        inference_seconds={"type": "number"},
        tokens=_COUNT,
        model_version=_TEXT,
    )
    return _object(["results", "usage"], results=_list(result), usage=usage)


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> Schema:
    return {JSON: {"schema": _named(name)}}


def _got(content: Schema) -> Schema:
    return {
        "responses": {
            "200": {"description": "done", "content": content},
            "default": {"description": "refused", "content": _json("Error")},
        }
    }


def _posted(request: str, content: Schema) -> Schema:
    return {"requestBody": {"required": True, "content": _json(request)}, **_got(content)}
